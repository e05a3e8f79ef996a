"""The engineer's way: photographs in folders, a pretrained network, and what leads to production.

    python examples/engineer.py [FOLDER]

Photographs are two that scikit-learn ships, cut into pieces: which one is a piece of? The pretrained network is a small
one that awconv ships, so that this takes a minute on one core. With yours, the first command is

    awconv fit --data=ImageFolder --data.root=photos --data.image_size=224 --model.network=resnet50 \
        --model.pretrained=true '--model.convert={init: identity}' --model.lr=0.01 --model.head_lr_factor=10

Needs `pip install 'awconv[train,onnx]'`.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

import awconv
from awconv.cli import main


def write_photographs(root: Path) -> None:
    """Folders as ImageFolder reads them: root/SPLIT/CLASS/IMAGE."""
    for name in ("china", "flower"):
        photograph = Image.fromarray(load_sample_image(f"{name}.jpg"))  # 640x427
        for index, left in enumerate(range(0, 576, 8)):
            if 376 < left < 448:
                continue  # so that no pixel is in both splits
            split = "test" if left >= 448 else "train"
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for top in (60, 150, 240):
                photograph.crop((left, top, left + 64, top + 64)).save(folder / f"{index:02d}-{top}.jpg")


def run(command: str) -> None:
    """What one types in a shell."""
    print(f"\n$ {command}", flush=True)
    if main(shlex.split(command)[1:]):
        sys.exit(f"failed: {command}")


os.chdir(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
write_photographs(Path("photos"))

# 1. Fine-tune. The new classifier starts at zeros and learns at ten times the rate of the rest.
run(
    "awconv fit --data=ImageFolder --data.root=photos --data.image_size=32 --data.batch_size=32 "
    "--model.network=aw_resnet8_cifar.cifar10_jpeg --model.pretrained=true --model.lr=0.01 --model.head_lr_factor=10 "
    "--trainer.max_epochs=3 --trainer.enable_progress_bar=false"
)
checkpoint = max(Path("lightning_logs").rglob("epoch=*.ckpt"), key=lambda path: path.stat().st_mtime)

# 2. Test, with the figures of each class and a picture of what is taken for what.
run(f"awconv test --ckpt={checkpoint} --data=ImageFolder --data.root=photos --report.folder=report")

# 3. Publish: a folder with weights, configuration and model card, which timm and awconv load.
run(f"awconv publish {checkpoint} --tag=photos --data='pieces of two photographs'")
published = next(Path("weights").iterdir())

# 4. Predict.
run(f"awconv predict --ckpt={published} photos/test/china/56-60.jpg photos/test/flower/56-60.jpg --top_k=2")

# 5. In Python: the network, its classes, its preprocessing.
loaded = awconv.load(published)
images = torch.stack([loaded.transform(Image.open(path)) for path in sorted(Path("photos/test").rglob("*-60.jpg"))])
with torch.inference_mode():
    logits = loaded.network(images)
print("\nclasses:", json.dumps(loaded.classes), "- the first image is", loaded.classes[int(logits[0].argmax())])

# 6. Export, for batches of any size, and compare.
batch = torch.export.Dim("batch")
torch.onnx.export(loaded.network, (images[:2],), "model.onnx", dynamo=True, dynamic_shapes=({0: batch},), verbose=False)
session = onnxruntime.InferenceSession("model.onnx")
(exported,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
difference = np.abs(exported - logits.numpy()).max()
print(f"model.onnx differs from PyTorch by at most {difference:.1e}")
assert difference < 1e-3 * np.abs(exported).max()
