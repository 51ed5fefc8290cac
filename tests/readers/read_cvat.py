"""Read the archives of a CVAT export with datumaro, which CVAT itself imports them with: FOLDER OUTPUT.npz."""

import json
import sys
import tempfile
import zipfile
from pathlib import Path

import datumaro
import numpy as np

folder, output = sys.argv[1:]
found = {}
for archive in sorted(Path(folder).glob("*.zip")):
    with tempfile.TemporaryDirectory() as scratch:
        zipfile.ZipFile(archive).extractall(scratch)
        data = datumaro.Dataset.import_from(scratch, "voc_segmentation")
        names = [label.name for label in data.categories()[datumaro.AnnotationType.label]]
        for item in data:
            mask = np.zeros(item.media_as(datumaro.Image).size, np.uint8)  # background is what no annotation covers
            for annotation in item.annotations:
                mask[annotation.image.astype(bool)] = annotation.label
            found[item.id] = mask
# Names of arrays in a file of numpy must be names of files.
keys = list(found)
np.savez(output, **{str(number): found[key] for number, key in enumerate(keys)})
Path(output).with_suffix(".json").write_text(json.dumps({"keys": keys, "names": names}))
