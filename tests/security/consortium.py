"""A server's kit and hospitals' kits, made as people make them."""

from running import run_script


class Consortium:
    """A server's kit and hospitals' kits in one folder, made by provision.py."""

    def __init__(self, folder):
        self.folder, self.kit = folder, folder / "server"
        self.provision("server", "--host", "fl.example.org", "--kit", self.kit)

    def provision(self, *options, fine: bool = True):
        done = run_script("provision.py", *options)
        assert not fine or done.returncode == 0, done.stderr
        return done

    def hospital(self, label: str, admitted: bool = True):
        """A hospital's kit."""
        kit = self.folder / label
        self.provision("hospital", "--name", label, "--kit", kit)
        if admitted:
            self.provision("admit", kit / "hospital.pub", "--kit", self.kit)
        (kit / "ca.pem").write_bytes((self.kit / "ca.pem").read_bytes())
        return kit
