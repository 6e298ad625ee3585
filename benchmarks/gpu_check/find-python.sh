#!/bin/sh
# Prints a Python that has what the check of the GPU path imports: the first whose torch sees a GPU,
# else the first. Candidates are the arguments, else .venv and the python3 on PATH. Installs nothing.
# stderr has a line for each that will not do, unless one sees a GPU; where none will, it exits with 1.
probe='
import importlib, sys
if sys.version_info < (3, 11):
    sys.exit("is Python %d.%d: Python 3.11 or newer is needed" % sys.version_info[:2])
missing = []
for name in ("torch", "safetensors", "numpy", "msgspec", "llguidance"):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as err:
        missing.append(name if err.name == name else "%s for %s" % (err.name, name))
    except Exception as err:
        missing.append("%s, which does not load (%s)" % (name, err))
if missing:
    sys.exit("has no " + ", no ".join(missing))
try:
    import workers.model.torch_private
except ImportError as err:
    sys.exit("has a torch that will not do: %s" % err)
import torch
print("cuda" if torch.cuda.is_available() else "cpu")
'
[ $# -gt 0 ] || set -- .venv/bin/python python3
usable=
reasons=
for name in "$@"; do
    path=$(command -v "$name") || {
        reasons="$reasons$name was not found
"
        continue
    }
    if found=$(PYTHONPATH=".${PYTHONPATH:+:$PYTHONPATH}" "$path" -c "$probe" 2>&1); then
        case $found in
            *cuda) echo "$path" && exit 0 ;;
        esac
        [ -n "$usable" ] || usable=$path
    else
        reasons="$reasons$name $(printf '%s\n' "$found" | tail -n 1)
"
    fi
done
if [ -n "$usable" ]; then
    reasons="$reasons$usable is taken: its torch sees no GPU
"
fi
printf '%s' "$reasons" | sed 's/^/gpu-check: /' >&2
[ -n "$usable" ] && echo "$usable"
