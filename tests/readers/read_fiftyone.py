"""Read a FiftyOne export with FiftyOne's own samples and masks, without its database: FOLDER OUTPUT.npz."""

import json
import os
import sys
from pathlib import Path

os.environ["FIFTYONE_DATABASE_URI"] = "mongodb://127.0.0.1:1/"  # it would start one of its own
os.environ["FIFTYONE_DO_NOT_TRACK"] = "true"

import fiftyone
import numpy as np

folder, output = sys.argv[1:]
targets = json.loads(Path(folder, "metadata.json").read_text())["info"]["default_mask_targets"]
found = {}
for document in json.loads(Path(folder, "samples.json").read_text())["samples"]:
    sample = fiftyone.Sample.from_dict(document)
    # Its importer puts the folder before the paths of an export.
    sample.pseudo_label.mask_path = str(Path(folder, sample.pseudo_label.mask_path))
    found[sample.key] = sample.pseudo_label.get_mask()
keys = list(found)
np.savez(output, **{str(number): found[key] for number, key in enumerate(keys)})
Path(output).with_suffix(".json").write_text(json.dumps({"keys": keys, "names": targets}))
