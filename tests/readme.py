"""The README's code blocks: `python tests/readme.py 2` prints the second bash block."""

import re
import sys
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def blocks(language):
    """The bodies of all fenced blocks of one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README.read_text(), re.S | re.M)


if __name__ == "__main__":
    print(blocks("bash")[int(sys.argv[1]) - 1].strip())
