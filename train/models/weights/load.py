"""From tensors in files to the weights of a decoder, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import jax
import numpy as np
from flax import nnx

from train import mesh
from train.models import families
from train.models.config import ModelConfig
from train.models.decoder import Decoder
from train.models.families.names import Form, Path, Place
from train.models.weights.tensors import Tensors

IGNORED_ENDS = (".rotary_emb.inv_freq", "rope_freqs.weight")
"""Tables that are computed, and that some files hold too."""


def check(config: ModelConfig, tensors: Tensors, form: Form) -> dict[str, Place]:
    """Where each tensor goes, if the file holds what the shape asks for; allocates nothing.

    Raises:
      ValueError: naming tensors that are missing, extra or of another shape, and a head that is
        said to be the embedding table and is not.
    """
    places = families.places(config, shapes(config), form)
    names = families.names_in_file(config, tensors.shapes)
    head, table = families.HEAD[form], families.EMBEDDING[form]
    problems = [f"{name} is missing" for name in places if name not in names]
    problems += [
        f"{name} is {list(found)} and must be {list(places[name].shape)}"
        for name, stored in names.items()
        if name in places and (found := tensors.shapes[stored]) != places[name].shape
    ]
    problems += [
        f"{name} has no place in a {config.model_type}"
        for name in names
        if name not in places and not name.endswith(IGNORED_ENDS) and name != head
    ]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{tensors.path}: {'; '.join(problems[:5])}{more}")
    if config.tied_head and head in names:
        tied = np.array_equal(tensors.read(names[head]), tensors.read(names[table]))
        if not tied:
            raise ValueError(
                f"{tensors.path}: tie_word_embeddings is true, but {names[head]} differs from"
                f" {names[table]}: set it to false in config.json"
            )
    return places


def load(
    config: ModelConfig,
    tensors: Tensors,
    form: Form,
    on: jax.sharding.Mesh | None = None,
) -> nnx.State:
    """The weights, each stack of layers filled in its place and put on its devices.

    The host holds one weight beside the model, never two models; a device holds its share.

    Args:
        config: the shape, read from the same files.
        tensors: the files.
        form: whose names and layouts they have.
        on: the devices, which share each weight as `train.mesh` says; None is JAX's default one.

    Raises:
      ValueError: what `check` raises, before anything is allocated; then for a tensor that is not
        finite, naming it and its file.
    """
    places = check(config, tensors, form)
    names = families.names_in_file(config, tensors.shapes)
    by_path: dict[Path, list[tuple[str, Place]]] = {}
    for name, place in places.items():
        by_path.setdefault(place.path, []).append((names[name], place))
    flat = {}
    for path, leaf in _flat(nnx.state(abstract(config))).items():
        weight = _assembled(leaf.shape, by_path[path], tensors)
        weight = weight.astype(leaf.dtype, copy=False)
        flat[path] = leaf.replace(
            jax.device_put(weight, mesh.sharding(".".join(path), leaf.shape, on))
        )
        del weight
    return nnx.from_flat_state(flat)


def _assembled(
    shape: tuple[int, ...], parts: list[tuple[str, Place]], tensors: Tensors
) -> np.ndarray:
    if parts[0][1].layer is None:
        name, place = parts[0]
        weight = np.ascontiguousarray(place.from_file(tensors.read(name)), np.float32)
        _check_finite(weight, tensors, name)
        return weight
    weight = np.empty(shape, np.float32)
    for name, place in parts:
        weight[place.layer] = place.from_file(tensors.read(name))
        _check_finite(weight[place.layer], tensors, name)
    return weight


def _check_finite(weight: np.ndarray, tensors: Tensors, name: str) -> None:
    # Both are NaN where any is, and neither makes an array as isfinite does: 0.04 s for 135M.
    if not (np.isfinite(weight.min()) and np.isfinite(weight.max())):
        raise ValueError(
            f"{tensors.file_of(name)}: {name} is NaN or infinite in"
            f" {np.sum(~np.isfinite(weight)):,} of {weight.size:,} places: fetch the file again, or"
            " take another copy of the model"
        )


def save(
    config: ModelConfig, params: nnx.State, dtype: str, others: Mapping[str, str] | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors as Hugging Face calls and lays them out, one after the other, in `dtype` but for
    those that `others` names."""
    flat = _flat(params)
    for name, place in families.places(config, shapes(config), "huggingface").items():
        leaf = flat[place.path][...]
        weight = np.asarray(leaf if place.layer is None else leaf[place.layer])
        own = jax.numpy.dtype((others or {}).get(name, dtype))
        yield name, np.ascontiguousarray(place.to_file(weight).astype(own))


def abstract(config: ModelConfig) -> Decoder:
    """The decoder's structure, with shapes for weights."""
    return nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(params=0)))


def shapes(config: ModelConfig) -> Mapping[Path, tuple[int, ...]]:
    return {path: leaf.shape for path, leaf in _flat(nnx.state(abstract(config))).items()}


def _flat(state: nnx.State) -> dict[Path, nnx.Variable]:
    return {tuple(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}
