"""Uploaded files, removed from Streamlit's store."""

from typing import cast

from streamlit.runtime.memory_uploaded_file_manager import MemoryUploadedFileManager
from streamlit.runtime.scriptrunner import get_script_run_ctx


def take_uploads(uploads: list) -> list[tuple[str, bytes]]:
    """(name, content) of Streamlit's uploaded files. Streamlit would keep their bytes until the session ends,
    upload after upload, so they are removed from its store (a call that is not public API)."""
    files = [(upload.name, upload.getvalue()) for upload in uploads]
    if run := get_script_run_ctx():
        store = cast(MemoryUploadedFileManager, run.uploaded_file_mgr)
        for upload in uploads:
            store.remove_file(session_id=run.session_id, file_id=upload.file_id)
    return files
