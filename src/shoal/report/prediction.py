"""The page of `shoal predict --compare`: one self-contained file, tables alone, no script.

document (the JSON of --compare)  →  prediction.html, page.css  →  predict.html

write_prediction_page(Path("runs/digits-0001/predict.html"), document)
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shoal.errors import RunFolderError
from shoal.version import __version__


def write_prediction_page(path: Path, document: Mapping[str, Any]) -> Path:
    """Write the page, whole or not at all. Raises `RunFolderError` where it cannot be written."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(render_prediction(document), encoding="utf-8", errors="replace")
        temporary.replace(path)
    except OSError as error:
        raise RunFolderError(
            f"{path} could not be written: {error.strerror or error}",
            hint="Give another file with --out.",
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def render_prediction(document: Mapping[str, Any]) -> str:
    """The page as text; every name in it is escaped."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined
    from markupsafe import Markup

    from shoal.report.page import _asset, _policy

    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FunctionLoader(_asset),
    )
    return environment.get_template("prediction.html").render(
        document=document, policy=_policy([]), style=Markup(_asset("page.css")), version=__version__
    )
