"""H100s that need not be there: XLA compiles for a chip that it is told of."""

from typing import Any

from jax.experimental import topologies

CHIP = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 13 }
gpu_device_info {
    cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
    core_count: 132
    clock_rate_ghz: 1.98
    fpus_per_core: 128
    threads_per_warp: 32
    threads_per_block_limit: 1024
    threads_per_core_limit: 2048
    registers_per_core_limit: 65536
    registers_per_block_limit: 65536
    shared_memory_per_block: 49152
    shared_memory_per_block_optin: 232448
    shared_memory_per_core: 233472
    block_dim_limit_x: 2147483647
    block_dim_limit_y: 65535
    block_dim_limit_z: 65535
    l2_cache_size: 52428800
    memory_bandwidth: 3352320000000
    device_memory_size: 84978434048
}
"""


def h100s(count: int) -> Any:
    """Devices of one host to compile for. It takes jax's CUDA plugin, and no GPU."""
    described = topologies.get_topology_desc(
        "H100", "cuda", target_config=CHIP, topology=f"1x1x{count}"
    )
    return described.devices
