"""`python -m train.diagnose`: how sure a model can be and is, and whether smoothing may help it."""

from __future__ import annotations

from train import start

if __name__ == "__main__":
    start.begin("python -m train.diagnose")  # the imports below take seconds

import dataclasses
import io
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from train import command_line
from train.data.encode import MIN_LENGTH
from train.flags import require, require_count, shown

JSON, PICTURE = "diagnosis.json", "diagnosis.png"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiagnoseOptions:
    """Says how sure a model's head can be, how sure it is on some text, whether label smoothing is
    likely to help, and what a temperature or a softcap would change.

    Written to --out as diagnosis.json and diagnosis.png as well.
    """

    model: Annotated[str, shown("RUN|MODEL")]
    """A run's folder, or what --model can be in training."""
    data: Annotated[tuple[Path, ...], shown("FILE ...", "Python's own documentation")] = ()
    """Text to look at: files as in training."""
    tokens: Annotated[int, shown("N")] = 512
    """Response tokens to look at, at most."""
    max_length: Annotated[int, shown("TOKENS")] = 256
    """Tokens in a packed row; longer records are cut."""
    label_smoothing: Annotated[float, shown("BETA")] = 0.1
    """The smoothing that is thought of."""
    template: Annotated[str, shown("NAME")] = "auto"
    """Chat template, as in training."""
    checkpoint: Annotated[str, shown("{best,last,STEP}")] = "last"
    """The checkpoint of a run whose weights are taken."""
    out: Annotated[Path, shown("FOLDER")] = Path("diagnosis")
    """Where the two files go."""

    def __post_init__(self) -> None:
        require_count("tokens", self.tokens)
        require(
            0 < self.label_smoothing <= 1,
            f"--label-smoothing must be in (0, 1], not {self.label_smoothing}",
        )
        require(
            self.max_length >= MIN_LENGTH,
            f"--max-length must be at least {MIN_LENGTH} tokens, not {self.max_length}",
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, or 2 for a user's mistake."""
    try:
        options = command_line.read(DiagnoseOptions, "python -m train.diagnose", arguments)
        run(options)
    except BrokenPipeError:
        raise  # nobody reads on
    except (ValueError, OSError) as error:
        print(f"python -m train.diagnose: {command_line.said(error)}", file=sys.stderr)
        return 2
    return 0


def run(options: DiagnoseOptions) -> None:
    """Measures, prints, writes; raises ValueError or OSError for a user's mistake."""
    from train.data import corpus, files, records
    from train.data.encode import encode_records
    from train.data.packing import pack
    from train.evaluation import diagnosis, diagnosis_picture, diagnosis_words
    from train.files import write, write_json
    from train.run import folder as run_folder
    from train.run import model as run_model
    from train.versions import versions

    run_folder.check_place(options.out)
    if options.data:
        text = [record for path in options.data for record in files.read(path)]
    else:  # what training with default flags holds out
        _, text = records.split(corpus.standard_library_records(), 0.1)
    loaded = run_model.read(options.model, template=options.template, checkpoint=options.checkpoint)
    # A record gives a label or more: no more of them are needed.
    usable = [record for record in text if not record.has_empty_response][: options.tokens]
    encoded = encode_records(loaded.tokenizer, usable, options.max_length)
    rows = pack([example for examples in encoded for example in examples], options.max_length)
    found, points = diagnosis.diagnose(
        loaded.model,
        rows,
        tokens=options.tokens,
        softcap=loaded.shape.final_softcap,
        label_smoothing=options.label_smoothing,
    )
    said = diagnosis_words.words(found)
    print("\n\n".join(textwrap.fill(part, 100) for part in said.split("\n\n")))
    options.out.mkdir(parents=True, exist_ok=True)
    name = Path(options.model).name
    content = {
        "format": 1,
        "model": name,
        "data": [path.name for path in options.data] or "Python's own documentation",
        "words": said,
        **plain(dataclasses.asdict(found)),
        "versions": versions(),
    }
    write_json(options.out / JSON, content)
    picture = io.BytesIO()
    diagnosis_picture.figure(name, found, points).savefig(picture, format="png", dpi=110)
    write(options.out / PICTURE, picture.getvalue())
    print(f"\n{options.out / JSON}, {options.out / PICTURE}")


def plain(found: dict) -> dict:
    """With the target's fields by name."""
    return found | {"target": found["target"]._asdict()}


if __name__ == "__main__":
    sys.exit(start.run(main))
