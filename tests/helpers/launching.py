"""Launches on a GPU that is not there: each stops where Triton would begin to compile, and what it would compile is
compared with what is compiled ahead."""

from types import SimpleNamespace

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
    found = []
    for each in sources:
        source, _, options = asked(each, device)
        found.append(described(source, options))
    return found


def differences(launched, known):
    """In words, for each launch that was not compiled ahead, what differs from the likeliest that was."""
    found = []
    for each in launched:
        if each in known:
            continue
        alike = [k for k in known if k[0] == each[0]]
        if not alike:
            found.append(f"{each[0]}: not compiled ahead at all")
            continue

        def parts(a, b):
            return {f"{n}: launched {x.get(n)}, ahead {y.get(n)}" for x, y in zip(a[1:], b[1:], strict=True)
                    for n in {*x, *y} if x.get(n) != y.get(n)}  # fmt: skip

        found.append(f"{each[0]}: " + "; ".join(sorted(min((parts(each, k) for k in alike), key=len))))
    return sorted(set(found))
