"""Removes a folder that the code could write in. Standard library alone."""

import os


def remove(folder: str) -> None:
    """However deep it is: what a folder inside holds is moved up before that one is removed. Stops at what it cannot
    remove."""
    try:
        while names := os.listdir(folder):
            for name in names:
                path = os.path.join(folder, name)
                if not is_folder(path):
                    os.unlink(path)
                    continue
                os.chmod(path, 0o700)
                for inner in os.listdir(path):
                    if is_folder(os.path.join(path, inner)):  # to move it means to write in it
                        os.chmod(os.path.join(path, inner), 0o700)
                    os.rename(os.path.join(path, inner), os.path.join(folder, os.urandom(8).hex()))
                os.rmdir(path)
        os.rmdir(folder)
    except OSError:
        pass


def is_folder(path: str) -> bool:
    return os.path.isdir(path) and not os.path.islink(path)
