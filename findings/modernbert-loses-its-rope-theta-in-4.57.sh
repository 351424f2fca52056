#!/usr/bin/env bash
# A ModernBERT saved by transformers 5 loads in 4.57 without a word and computes something else.
#
# Version 5 writes the bases of the rotary positions as rope_parameters. global_rope_theta and local_rope_theta, which
# 4.57 reads, are not in the file. So 4.57 takes its defaults, 160,000 and 10,000: all weights load, no warning comes,
# and the outputs are right only for a model that was trained with just these.
#
# Expected: the outputs of 5, a warning or an error. Remedy: both forms in config.json.
#
# Seen with: transformers 5.24.0 and 4.57.6, torch 2.13.0 (CPU).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1 HF_HUB_OFFLINE=1
python3 -m venv "$work/venv"
cat >"$work/load.py" <<'EOF'
import json
import logging
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModel

folder, said = Path(sys.argv[1]), []


class Listener(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())


logging.captureWarnings(True)
logging.getLogger("py.warnings").addHandler(Listener())
transformers.utils.logging.add_handler(Listener())
transformers.utils.logging.disable_progress_bar()
model, report = AutoModel.from_pretrained(folder, output_loading_info=True)
with torch.no_grad():
    out = model.eval()(torch.arange(2, 50)[None]).last_hidden_state
lost = sum(map(len, report.values()))
off = (out - torch.load(folder / "out.pt")).abs().max().item()
print(f"transformers {transformers.__version__}: {lost} weights amiss, warnings {said}, outputs off by {off:.4f}")
(folder / "off.json").write_text(json.dumps([off, lost, said]))
EOF
"$work/venv/bin/pip" install -q transformers==5.24.0 tokenizers==0.23.3 torch==2.13.0 numpy==2.4.6
"$work/venv/bin/python" - "$work/model" <<'EOF'
import json
import sys
from pathlib import Path

import torch
import transformers
from transformers import ModernBertConfig, ModernBertModel

folder = Path(sys.argv[1])
transformers.utils.logging.disable_progress_bar()
torch.manual_seed(0)
tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "cls_token_id": 1, "sep_token_id": 1}
size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "vocab_size": 64}
kinds = ("full_attention", "sliding_attention")
thetas = {kind: {"rope_type": "default", "rope_theta": 1000.0} for kind in kinds}
model = ModernBertModel(ModernBertConfig(**size, **tokens, initializer_range=0.5, rope_parameters=thetas)).eval()
model.save_pretrained(folder)
with torch.no_grad():
    out = model(torch.arange(2, 50)[None]).last_hidden_state
torch.save(out, folder / "out.pt")
written = json.loads((folder / "config.json").read_text())
print("torch", torch.__version__, "transformers", transformers.__version__, "writes", written["rope_parameters"])
print(f"outputs have a standard deviation of {out.std():.4f}")
assert "global_rope_theta" not in written and "local_rope_theta" not in written
EOF
"$work/venv/bin/python" "$work/load.py" "$work/model"
mv "$work/model/off.json" "$work/new.json"
"$work/venv/bin/pip" install -q transformers==4.57.6 tokenizers==0.22.2 torch==2.13.0 numpy==2.4.6
"$work/venv/bin/python" "$work/load.py" "$work/model"
"$work/venv/bin/python" - "$work/model" "$work/new.json" <<'EOF'
import json
import sys
from pathlib import Path

from transformers import AutoConfig

folder, new = Path(sys.argv[1]), Path(sys.argv[2])
config = AutoConfig.from_pretrained(folder)
print("4.57 reads thetas", config.global_rope_theta, config.local_rope_theta)
off, lost, said = json.loads((folder / "off.json").read_text())
assert json.loads(new.read_text())[0] < 1e-4
assert off > 0.5 and lost == 0 and not said
assert (config.global_rope_theta, config.local_rope_theta) == (160000.0, 10000.0)
EOF
