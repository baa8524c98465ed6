"""Make the golden curve anew, after a change of the mathematics: `OMP_NUM_THREADS=1 python tests/golden/make.py`."""

import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "tests"))
sys.path.insert(0, str(ROOT))

from test_train import GOLDEN, launch, maker, metrics  # noqa: E402

with tempfile.TemporaryDirectory() as folder:
    done = launch(ROOT / "configs" / "tiny.yaml", f"run_dir={folder}/tiny")
    if done.returncode:
        sys.exit(done.stderr)
    GOLDEN.write_text("".join(json.dumps(row) + "\n" for row in [maker(), *metrics(Path(folder) / "tiny")]))
