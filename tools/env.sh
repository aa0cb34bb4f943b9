# Makes .venv at the root of the checkout, installs onnxgbp there (editable) with the extras named,
# and activates it. To be sourced by bash:  . tools/env.sh cpu,dev

onnxgbp_env() {
    local extras=$1 root venv python candidate stamp wanted
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P) || return
    venv=$root/.venv
    # Being run is the test, not being found: a name on the PATH may be a stub that starts nothing.
    local usable='import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 10))'

    # A checkout may have been moved, and an environment cannot be: it is made anew then.
    if ! "$venv/bin/python" -c "$usable" 2>/dev/null ||
        ! grep -qF "$venv" "$venv/bin/activate"; then
        python=
        for candidate in python3 python3.13 python3.12 python3.11 python3.10; do
            if "$candidate" -c "$usable" 2>/dev/null; then python=$candidate && break; fi
        done
        if [ -z "$python" ]; then
            echo "onnxgbp needs Python 3.10 or newer with its venv module: neither python3 nor" \
                "python3.13 to python3.10 is one" >&2
            return 1
        fi
        "$python" -m venv --clear "$venv" || return
    fi

    # One stamp for each list of extras, so that callers with different ones do not undo each other.
    stamp=$venv/.installed-${extras//,/-}
    wanted=$(cksum <"$root/pyproject.toml") || return
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        echo "installing onnxgbp${extras:+[$extras]} into .venv ..." >&2
        # -qq: errors only. The build's note on editable installs, for one, would alarm and tell nothing.
        "$venv/bin/python" -m pip install -qq --upgrade pip || return
        "$venv/bin/python" -m pip install -qq -e "$root${extras:+[$extras]}" || return
        echo "$wanted" >"$stamp"
    fi
    . "$venv/bin/activate"
}

onnxgbp_env "${1:-}"
