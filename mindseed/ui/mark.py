"""The seedling and the name: a file of its own, for the first page shows them before all else is imported."""
from __future__ import annotations

import base64

SEEDLING = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 48 48" width="48" height="48" fill="none">
<path d="M24 41V23" stroke="#1f8a5b" stroke-width="3.2" stroke-linecap="round"/>
<path d="M24 27C10 28 5 19 5 9c13-1 20 6 19 18Z" fill="#55c08d"/>
<path d="M24 24c-1-12 6-18 19-17 1 11-6 18-19 17Z" fill="#1f8a5b"/>
<path d="M24 27C21 20 16 15 10 13M24 24c3-6 8-10 14-12" stroke="#fff" stroke-opacity=".55" stroke-width="1.5"
 stroke-linecap="round"/>
<path d="M10 43.2c4-3.6 24-3.6 28 0" stroke="#a0703c" stroke-width="3.2" stroke-linecap="round"/>
</svg>"""

NAME = """M58 33V19M58 24.5a5.2 5.2 0 0 1 10.4 0V33M68.4 24.5a5.2 5.2 0 0 1 10.4 0V33 M86.3 19V33
M93.8 33V19M93.8 25a5.8 5.8 0 0 1 11.6 0V33 M126 26a7 7 0 1 1-14 0 7 7 0 1 1 14 0M126 9V33
M141.6 21.2c-1-1.5-2.6-2.2-4.3-2.2-2.6 0-4.3 1.4-4.3 3.4 0 5 9.1 2.2 9.1 7.2 0 2.2-2 3.6-4.6 3.6-2.1 0-3.9-.9-4.9-2.5
M148.6 26H162.4M162.4 25.8a6.9 6.9 0 1 0-2.5 5.4 M168.8 26H182.6M182.6 25.8a6.9 6.9 0 1 0-2.5 5.4
M203 26a7 7 0 1 1-14 0 7 7 0 1 1 14 0M203 9V33"""         # the letters, one after the other, as strokes
ICON = "data:image/svg+xml;base64," + base64.b64encode(SEEDLING.encode()).decode()
