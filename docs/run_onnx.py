"""Label a photograph with a network that `lightning export` wrote: `python run_onnx.py NETWORK.onnx PHOTO MASK.png`.

The script needs onnxruntime, numpy and pillow, and nothing of this project.
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

network, photo, mask = sys.argv[1:]
session = onnxruntime.InferenceSession(network, providers=["CPUExecutionProvider"])
about = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}

image = ImageOps.exif_transpose(Image.open(photo)).convert("RGB" if about["in_channels"] == 3 else "L")
if about["size"]:  # the network accepts a single size of image
    image = image.resize(about["size"][::-1], Image.Resampling.BILINEAR)
pixels = np.asarray(image, dtype=np.uint8).reshape(1, image.height, image.width, -1).transpose(0, 3, 1, 2)
probs = session.run(["probs"], {"image": pixels})[0][0]  # (classes, height, width); a single class is the foreground
labels = probs[0] > 0.5 if len(probs) == 1 else probs.argmax(axis=0)

drawn = Image.fromarray(labels.astype(np.uint8))
drawn.putpalette(np.array(about["palette"], dtype=np.uint8).tobytes())
drawn.save(mask)
for label, share in enumerate(np.bincount(labels.ravel(), minlength=len(about["class_names"])) / labels.size):
    print(f"{about['class_names'][label]:20} {share:6.1%}")
