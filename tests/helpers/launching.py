"""Launches on a GPU that is not there: each stops where Triton would begin to compile, and what it would compile is
compared with what is compiled ahead."""

from types import SimpleNamespace

from moecache.kernels import running
from moecache.kernels.compile import asked, target


def driver_of(device):
    """As much of a Triton driver for that device as a launch that only compiles asks for."""
    return SimpleNamespace(get_current_target=lambda: target(device), get_current_device=lambda: 0,
                           get_current_stream=lambda number: 0)  # fmt: skip


def launches(monkeypatch, device):
    """A list that every launch on that device adds to: what Triton would compile for it."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    found, run = [], JITFunction.run

    def stop(self, key, signature, index, constexprs, options, attrs, warmup):
        found.append(described(self.ASTSource(self, signature, constexprs, attrs), options.__dict__))

    def ran(self, *args, grid, warmup, **kwargs):
        self.device_caches.clear()
        run(self, *args, grid=grid, warmup=warmup, **kwargs)
        self.device_caches.clear()

    monkeypatch.setattr(running, "device_of", lambda out: device)
    monkeypatch.setattr(JITFunction, "_do_compile", stop)
    monkeypatch.setattr(JITFunction, "run", ran)
    monkeypatch.setattr(driver, "_active", driver_of(device), raising=False)
    return found


def described(source, options):
    """All that the key of Triton's disk cache holds, but the text of the kernel."""
    names = list(source.fn.arg_names)
    attrs = {names[path[0]]: sorted(str(a[0]) for a in listed) for path, listed in source.attrs.items()}
    kinds = {n: (k, attrs.get(n)) for n, k in source.signature.items() if k != "constexpr"}
    constants = {names[path[0]]: repr(value) for path, value in source.constants.items()}
    known = {n: v for n, v in options.items() if v is not None}
    return source.fn.__name__, kinds, constants, {n: repr(v) for n, v in sorted(known.items())}


def ahead(sources, device):
    """What is compiled ahead for these, described alike."""
    return [described(source, options) for source, _, options in (asked(each, device) for each in sources)]


def differences(launched, known):
    """Of two lists of the same kernels: kernel and parameter, and what one asks for and the other has."""
    assert [each[0] for each in launched] == [each[0] for each in known]
    return {
        (one[0], part, f"launched {x.get(part)}, ahead {y.get(part)}")
        for one, other in zip(launched, known, strict=True) for x, y in zip(one[1:], other[1:], strict=True)
        for part in {*x, *y} if x.get(part) != y.get(part)
    }  # fmt: skip
