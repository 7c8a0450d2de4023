"""Execution of a notebook without Jupyter: its code cells in order, in one namespace, outputs stored.

    python -m scripts.notebook examples/diagnostic.ipynb

An output is what a cell prints, and every matplotlib figure that is open at its end.
"""

import argparse
import base64
import contextlib
import io
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from scripts.arguments import Arguments, existing_file


def execute(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Run the code cells of a notebook and put their outputs in place; returns the names they left."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    for number, cell in enumerate(code, start=1):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), namespace)
        cell["execution_count"] = number
        cell["outputs"] = [*_text(printed.getvalue()), *_figures()]
    return namespace


def _text(printed: str) -> list[dict[str, Any]]:
    lines = printed.splitlines(keepends=True)
    return [{"output_type": "stream", "name": "stdout", "text": lines}] if lines else []


def _figures() -> list[dict[str, Any]]:
    outputs = []
    for number in plt.get_fignums():
        file = io.BytesIO()
        # Without the name of the software, the same figure is the same file.
        plt.figure(number).savefig(file, dpi=90, metadata={"Software": None})
        data = {"image/png": base64.b64encode(file.getvalue()).decode()}
        outputs.append({"output_type": "display_data", "data": data, "metadata": {}})
    plt.close("all")
    return outputs


def read_notebook(text: str) -> tuple[Path, dict[str, Any]]:
    """A notebook that is there, has cells and can be written back: the `type` of an argument.

    Raises:
        argparse.ArgumentTypeError: it does not.
    """
    path = existing_file(text)
    try:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                "".join(cell["source"])
    except (ValueError, LookupError, TypeError) as error:
        raise argparse.ArgumentTypeError(f"{text} is no notebook ({error})") from error
    # Before minutes of work that could not be kept.
    try:
        path.open("r+").close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write to {text}: {error.strerror}") from error
    return path, notebook


def main(path: Path, notebook: dict[str, Any]) -> None:
    """Execute the notebook that was read from `path` and write it back."""
    execute(notebook["cells"])
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = Arguments(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("notebook", type=read_notebook, help="is executed and written back")
    main(*parser.parse_args().notebook)
