"""Writes the weights of other libraries that test_convert.py and an example read.

Needs torch, safetensors, keras, haiku and equinox, and is run by hand:

    python tests/golden/write_weights.py

torch: a narrow ResNet-18 with torchvision's names. keras: a small model. layers: each
layer of test_convert.py, with its weights and its output in each library.
"""

import os
import pathlib
import sys

import numpy as np

FOLDER = pathlib.Path(__file__).parent / "weights"
WIDTH, CLASSES = 2, 5
SAFETENSORS, KERAS = FOLDER / "resnet18.safetensors", FOLDER / "model.keras"
LAYERS = FOLDER / "layers.npz"


def torch_resnet18(width=64, classes=1000):
    """ResNet-18 as torchvision names it, with weights and statistics at random."""
    import torch
    from torch import nn

    def conv(c_in, c_out, size, stride):
        return nn.Conv2d(c_in, c_out, size, stride, size // 2, bias=False)

    class Block(nn.Module):
        def __init__(self, c_in, c_out, stride):
            super().__init__()
            self.conv1, self.bn1 = conv(c_in, c_out, 3, stride), nn.BatchNorm2d(c_out)
            self.conv2, self.bn2 = conv(c_out, c_out, 3, 1), nn.BatchNorm2d(c_out)
            self.downsample = None
            if c_in != c_out:
                self.downsample = nn.Sequential(
                    conv(c_in, c_out, 1, stride), nn.BatchNorm2d(c_out)
                )

        def forward(self, x):
            y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
            return torch.relu(y + (self.downsample(x) if self.downsample else x))

    class ResNet18(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = conv(3, width, 7, 2), nn.BatchNorm2d(width)
            c_in = width
            for i in range(4):
                c_out = width * 2**i
                first = Block(c_in, c_out, 1 if i == 0 else 2)
                layer = nn.Sequential(first, Block(c_out, c_out, 1))
                setattr(self, f"layer{i + 1}", layer)
                c_in = c_out
            self.fc = nn.Linear(c_in, classes)

        def forward(self, x):
            x = torch.relu(self.bn1(self.conv1(x)))
            x = nn.functional.max_pool2d(x, 3, 2, 1)
            for i in range(4):
                x = getattr(self, f"layer{i + 1}")(x)
            return self.fc(x.mean((2, 3)))

    torch.manual_seed(0)
    model = ResNet18()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, std=0.2)
    with torch.no_grad():  # statistics of what passes through
        for _ in range(3):
            model.train()(torch.rand(8, 3, 64, 64))
    return model.eval()


def keras_model():
    """One layer of each kind, with weights and statistics at random."""
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import keras
    from keras import layers

    keras.utils.clear_session()  # which counts layers by name
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(4, 3, padding="same"),
            layers.BatchNormalization(),
            layers.DepthwiseConv2D(3, depth_multiplier=2, activation="relu"),
            layers.BatchNormalization(scale=False),
            layers.Conv2DTranspose(5, (3, 2), strides=2, activation="relu"),
            layers.LayerNormalization(),
            layers.Conv2D(10, 3, groups=5),
            layers.GroupNormalization(groups=2),
            layers.GlobalAveragePooling2D(),
            layers.Dense(3),
        ]
    )
    rng = np.random.default_rng(0)
    for weight in model.weights:
        if weight.dtype == "float32":
            spread = rng.uniform(0.5, 1.5, weight.shape)
            weight.assign(spread if "variance" in weight.path else spread - 0.8)
    return model


def layers():
    """Weights and output of each layer in each library, by library/layer/name."""
    sys.path.insert(0, str(FOLDER.parent.parent))
    import test_convert

    found = {}
    for library, (of, names) in test_convert.OF.items():
        for name in names:
            weights, y = of(name)
            for key, a in {**weights, "y": y}.items():
                found[f"{library}/{name}/{key}"] = np.asarray(a)
    return found


def main():
    import safetensors.torch
    import torch

    FOLDER.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    model = torch_resnet18(WIDTH, CLASSES)
    x = rng.integers(0, 256, (2, 32, 32, 3), np.uint8)
    with torch.no_grad():
        nchw = torch.from_numpy(np.moveaxis(x, -1, 1).astype(np.float32) / 255)
        y = model(nchw).numpy()
    safetensors.torch.save_file(model.state_dict(), SAFETENSORS)
    np.savez_compressed(FOLDER / "resnet18.npz", x=x, y=y)

    model = keras_model()
    x = rng.integers(0, 256, (2, 8, 8, 3), np.uint8)
    model.save(KERAS)
    y = np.asarray(model(x.astype(np.float32) / 255))
    np.savez_compressed(FOLDER / "keras.npz", x=x, y=y)
    np.savez_compressed(LAYERS, **layers())
    for path in sorted(FOLDER.iterdir()):
        print(f"{path.name}: {path.stat().st_size / 1024:.0f} KiB", file=sys.stderr)


if __name__ == "__main__":
    main()
