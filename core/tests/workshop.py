"""A bench for tests of `diffgraft check`: skeletons with one thing changed."""

from __future__ import annotations

from itertools import count

from diffgraft.community.check import check, open_project
from diffgraft.community.new import Answers, write_plugin

NUMBERS = count()


FAMILY = "pixart"


class Workshop:
    """Makes plugins whose files differ from the skeleton's by replacements."""

    def __init__(self, home):
        self.home = home

    def make(self, changes=(), hook="denoise", name=None):
        """A folder. ``changes``: (file, old, new); the file "py" is the package's, "toml" its quality.toml, "preset" one of its
        presets, "append" adds at the end."""
        name = name or f"chk{next(NUMBERS)}"
        folder = write_plugin(Answers(name, hook, "2401.00000", "A title"), self.home / name)
        short = {"py": f"diffgraft_{name}/__init__.py", "toml": f"diffgraft_{name}/quality.toml"}
        short["preset"] = f"diffgraft_{name}/presets/fast.yaml"
        for file, old, new in changes:
            path = folder / short.get(file, file)
            text = path.read_text() if path.exists() else ""
            if old == "append":
                text += new
            else:
                assert old in text, (file, old)
                text = text.replace(old, new)
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        return folder

    def check(self, changes=(), hook="denoise", behaviour=False, contract=False, **options):
        return check(open_project(str(self.make(changes, hook, **options))), behaviour, contract, [FAMILY])


BODY = "        prediction: Tensor = next(call)\n"


RETURN = "        return prediction if self.config.strength == 0 else placeholder(prediction, self.config.strength)\n"


def in_hook(line):
    """Put a line into ``denoise``."""
    return [("py", BODY, BODY + f"        {line}\n")]


def helper(text, call):
    """Put a function into the module, and a call of it into ``denoise``."""
    return [("py", "append", text), *in_hook(call)]


def carded(gain, where):
    """Put figures onto the card."""
    return [("toml", 'gain = ""', f'gain = "{gain}"'), ("toml", 'gain_where = ""', f'gain_where = "{where}"')]
