"""Data sets of the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path


def files(what: str, dataset: str, pattern: str, instead: str) -> list[Path]:
    """The files of a data set that match, in order; huggingface_hub keeps them in its cache.

    Raises ValueError if there are none or they cannot be had: `what` come from there, and what to
    do `instead`.
    """
    try:
        import huggingface_hub

        folder = huggingface_hub.snapshot_download(
            dataset, repo_type="dataset", allow_patterns=[pattern]
        )
        found = sorted(Path(folder).glob(pattern))
        if not found:
            raise ValueError(f"no {pattern} in it")
    except Exception as error:  # of any kind: no network, no such name, no right to it
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ValueError(
            f"{what} come from the Hugging Face hub, data set {dataset}, files {pattern}, which"
            f" cannot be had: {reason}. {instead}"
        ) from None
    return found
