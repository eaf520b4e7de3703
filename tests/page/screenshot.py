"""Take the picture of a page that the documentation shows.

``python -m tests.page.screenshot runs/digits/report.html docs/html_report.png`` took the one of ``examples.digits``.
"""

from __future__ import annotations

import base64
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.page.browser import opened

WIDTH, HEIGHT = 1080, 1310


def main(page: str, picture: str) -> None:
    """Save the upper part of a page, as it is seen on a desk in the light colour scheme."""
    with TemporaryDirectory() as profile, opened(Path(profile)) as browser:
        browser.show(Path(page).resolve(), WIDTH)
        clip = {"x": 0, "y": 0, "width": WIDTH, "height": HEIGHT, "scale": 1}
        taken = browser.command("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
    Path(picture).write_bytes(base64.b64decode(taken["data"]))


if __name__ == "__main__":
    main(*sys.argv[1:])
