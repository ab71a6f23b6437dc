"""Scans on disk: the files in a folder, the mask of each slice, the patients, and the orientation of volumes."""
