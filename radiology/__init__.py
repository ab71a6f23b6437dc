"""From a hospital's archive to the dataset's layout, and back: the code that only DICOM and NIfTI need."""
