"""An export that one transformers saves again and another loads: python resaved.py (save | load) FOLDER

For two environments, the newest transformers and the oldest that is supported: 4.57 reads keys of config.json that
save_pretrained of 5.x leaves out.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoModelForMaskedLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tiny_run import make_run, tiny_config

from cramfast.export import export

IDS = torch.arange(5, 105)[None]


@torch.no_grad()
def logits(folder: Path, saved: Path | None = None) -> np.ndarray:
    """Of a stock model, which is saved on the way if asked for."""
    config = AutoConfig.from_pretrained(folder)
    config.reference_compile = False
    model = AutoModelForMaskedLM.from_pretrained(folder, config=config, attn_implementation="sdpa").eval()
    if saved:
        model.save_pretrained(saved)
    return model(input_ids=IDS).logits.numpy()


def main() -> None:
    """The command line."""
    what, folder = sys.argv[1], Path(sys.argv[2])
    if what == "save":
        with tempfile.TemporaryDirectory() as temporary:
            run = make_run(Path(temporary) / "run", tiny_config(layers=4, global_every=3, window=16))
            made = logits(export(run, Path(temporary) / "out").path, folder)
        np.save(folder / "logits.npy", made)
        return
    difference = float(np.abs(logits(folder) - np.load(folder / "logits.npy")).max())
    print(f"transformers {transformers.__version__}: logits differ by {difference:.1e}")
    sys.exit(difference > 1e-4)


if __name__ == "__main__":
    main()
