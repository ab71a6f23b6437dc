"""Make the app's sample cases: phantoms as ZIPs of JPEG slices with masks.

    python deployment/make_samples.py

The same code gives the same bytes.
"""

import io
import tempfile
import zipfile
from pathlib import Path

from PIL import Image

from dataset import load_dataset
from phantoms.patients import make_phantoms

SAMPLES = Path(__file__).parent / "app" / "samples"
SEED = 2026  # seed of phantoms that the README's models were not trained on
COUNT = 3


def main() -> None:
    SAMPLES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        make_phantoms(Path(folder), patients=COUNT, slices=16, size=256, seed=SEED)
        for number, patient in enumerate(load_dataset(Path(folder)).patients, start=1):
            path = SAMPLES / f"phantom_{number}.zip"
            with zipfile.ZipFile(path, "w") as archive:
                for place, (image, mask) in enumerate(zip(patient.images, patient.masks), start=1):
                    slice_name = f"phantom_{number}_{place}"  # unlike any patient's
                    for source, name, options in (
                        (image, f"{slice_name}.jpg", {"quality": 92}),
                        (mask, f"{slice_name}_mask.png", {}),
                    ):
                        file = io.BytesIO()
                        Image.open(source).save(
                            file, format="PNG" if name.endswith("png") else "JPEG", **options
                        )
                        # a fixed time: the same phantoms give the same bytes
                        archive.writestr(zipfile.ZipInfo(name), file.getvalue())
            print(f"wrote {path}, {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
