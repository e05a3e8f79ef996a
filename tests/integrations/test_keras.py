"""AW-convolutions in Keras, whose backend is chosen when it is imported: in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.documents import ROOT, examples

pytestmark = pytest.mark.skipif(find_spec("keras") is None, reason="needs Keras: pip install keras")


def run(code: str, folder: Path) -> None:
    environment = {**os.environ, "KERAS_BACKEND": "torch", "KERAS_HOME": str(folder)}
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr


def test_the_example_of_the_page_runs(tmp_path: Path) -> None:
    (example,) = [e for e in examples(ROOT / "docs/integrations/frameworks.md", "python") if "keras" in e.text]
    run(example.text, tmp_path)


LAYERS = """
import awconv, keras, numpy, torch
from sklearn.datasets import load_digits
images, labels = (load_digits().images / 16).astype("float32")[:, None], load_digits().target
wrap = keras.layers.TorchModuleWrapper
attended = wrap(awconv.AWConv2d(8, 16, 3, padding=1))
model = keras.Sequential([
    keras.Input((1, 8, 8)), wrap(torch.nn.Conv2d(1, 8, 3, padding=1)), attended, keras.layers.ReLU(),
    keras.layers.GlobalAveragePooling2D(data_format="channels_first"), keras.layers.Dense(10),
])
model.compile(optimizer=keras.optimizers.Adam(0.01), loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
branch = attended.module.attention
before = {name: value.clone() for name, value in branch.state_dict().items()}
losses = model.fit(images[:512], labels[:512], epochs=3, batch_size=64, verbose=0).history["loss"]
assert losses[2] < losses[0], losses
assert all(not torch.equal(value, before[name]) for name, value in branch.state_dict().items())
found = model.predict(images[:8], verbose=0)
assert not branch.training
assert numpy.array_equal(found, model.predict(images[:8], verbose=0))
assert attended.count_params() == sum(p.numel() for p in attended.module.parameters())
"""


def test_a_layer_among_keras_own_learns(tmp_path: Path) -> None:
    run(LAYERS, tmp_path)
