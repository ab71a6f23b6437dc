"""From a hospital's archive to the dataset's layout, and back: what DICOM and NIfTI need and nothing else
does."""
