"""Gin files and bindings, in a checkout and in an installed package; an error in them is one line."""

import ast
import contextlib
import difflib
import functools
import inspect
import itertools
import logging
import operator
import re
import tokenize
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import gin

from retrieval_jax.core import values
from retrieval_jax.core.errors import UserError

# Only plain files: gin's other reader takes `include 'models/tiny.gin'` for a Python package of that name,
# and fails where the working folder happens to have a folder models/.
gin.config._FILE_READERS[1:] = []

BASE = "base.gin"  # read first: it defines every macro and wires the verbs to them
QUOTES = "a text in quotes of its own, as in --gin.make_index.kind=\"'exact'\""
_given: tuple[list[str], list[str]] = ([], [])
_scopes: list[values.Names] = []


def gin_folder() -> Path:
    """Returns the folder `gin_configs`: beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).parents[1]
    inside = package / "gin_configs"
    return inside if inside.is_dir() else package.parent / "gin_configs"


def macros() -> list[str]:
    """Returns the names that `--NAME=` may set on the command line: the macros that base.gin defines."""
    return re.findall(r"^([A-Z_]+) =", (gin_folder() / BASE).read_text(), re.MULTILINE)


def configure(files: Sequence[str], bindings: Sequence[str]) -> None:
    """Reads base.gin, then the files, then the bindings. Later values replace earlier ones.

    A macro whose value is a text takes it without quotes, too: `COLLECTION=path/to/folder`.

    Args:
      files: gin files, by a path or by a path below `gin_configs`.
      bindings: `NAME=VALUE` each, of a macro or of a parameter (`function.parameter`).

    Raises:
      UserError: a file is missing, a name does not exist, or a value cannot be read or is not what its
        parameter's annotation asks for (see `values`).
    """
    global _given
    _given = (list(files), list(bindings))
    gin.clear_config()
    for folder in (gin_folder().parent, gin_folder()):
        gin.add_config_file_search_path(str(folder))
    for file in (BASE, *files):
        with _one_line(f"--gin_file={file}"):
            gin.parse_config_file(file)
    known, texts = macros(), _text_macros()
    for binding in bindings:
        name, _, value = (part.strip() for part in binding.partition("="))
        # As people usually write it: a macro needs no `gin.`.
        option = f"--{binding}" if re.fullmatch("[A-Z_]+", name) else f"--gin.{binding}"
        if name in texts and not _is_literal(value):
            binding = f"{name}={value!r}"
        if re.fullmatch(r"\w+", name) and name not in known and not _defined(name):
            raise UserError(f"{option.partition('=')[0].strip()}: no such name: {_meant(name, known)}")
        with _one_line(option):
            gin.parse_config(binding)
    _check_macros(known)
    _check_scopes()
    _check_values()
    _one_number_of_steps()


def _is_literal(value: str) -> bool:
    """Returns whether a text on the command line is meant as a gin value: quoted, None, a macro or a list."""
    if re.fullmatch(r"%[A-Z_]+", value):
        return True
    try:
        literal = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return False
    return literal is None or isinstance(literal, str | tuple | list)


def _text_macros() -> set[str]:
    """Returns the macros whose value is a text (or None) wherever base.gin gives it to a parameter."""
    kinds: dict[str, list[bool]] = {}
    for (_, selector), parameters in gin.config._CONFIG.items():
        annotations = {} if selector == "gin.macro" else _annotations(gin.config._REGISTRY[selector].wrapped)
        for parameter, value in parameters.items():
            if _is_macro(value):
                kind = annotations.get(parameter)
                kinds.setdefault("/".join(value.scopes), []).append(str in (kind, *typing.get_args(kind)))
    return {macro for macro, texts in kinds.items() if all(texts)}


def _meant(name: str, known: Sequence[str]) -> str:
    """Returns the hint for a name that does not exist."""
    close = difflib.get_close_matches(name, known, 1)
    return f"did you mean {close[0]}?" if close else f"the names are {', '.join(known)}"


def _check_macros(known: Sequence[str]) -> None:
    """Raises UserError for a `%NAME` that is not defined, and for a macro that nothing uses.

    gin itself reports the first only when the value is needed, and the second never.
    """
    used = set()
    for place, leaf in _leaves():
        if _is_macro(leaf):
            used.add(macro := "/".join(leaf.scopes))
            if not _defined(macro):
                raise UserError(f"{place}: %{macro}: no such name: {_meant(macro, known)}")
    for macro, selector in gin.config._CONFIG:
        if selector == "gin.macro" and macro not in (*known, *used):
            raise UserError(f"{macro}: no such name: {_meant(macro, known)}")


def texts_of_parameters(modules: Sequence[str], references: Sequence[str] = ()) -> dict[str, str]:
    """Gives the gin parameters, as text, of some modules' functions and classes, and of what these refer to.

    A parameter may refer to a function of any module, an objective for example: its parameters count, too,
    and so do those that hold in the scope of the reference (`@SCOPE/rdrop`).
    Inside of a gin scope (`demo` trains each model in one of its name) the values of that scope count, by the
    names that they have outside: the same run without the scope has the same parameters.

    Args:
      modules: beginnings of the modules' names.
      references: names of parameters ("train.retriever") whose functions and classes count wherever they are.

    Returns:
      "FUNCTION.PARAMETER" (or "SCOPE/FUNCTION.PARAMETER") -> the value that gin gives, or else the default,
      of all functions and classes that were called, that have a value by gin, or that are referred to. The
      names of macros are replaced by their values.
    """
    known = {**gin.config._CONFIG, **gin.config._OPERATIVE_CONFIG}
    macros = {scope: bound.get("value") for (scope, name), bound in known.items() if name == "gin.macro"}

    def text(value: object) -> str:
        if callable(value):
            return getattr(value, "__name__", repr(value))
        shown = re.sub(r"%([\w.]+)", lambda m: text(macros[m[1]]) if m[1] in macros else m[0], repr(value))
        return shown.removeprefix("@")

    here, bound = gin.current_scope_str(), {}
    for (scope, selector), parameters in sorted(known.items(), key=lambda item: item[0][0] == here != ""):
        if scope in ("", here):
            bound.setdefault(selector, {}).update(parameters)
    found: dict[tuple[str, str], dict] = {}
    pending = [("", selector) for selector in bound if selector.startswith(tuple(modules))]
    for selector, parameters in bound.items():
        function = selector.rpartition(".")[2]
        given = [value for name, value in parameters.items() if f"{function}.{name}" in references]
        pending += filter(None, map(_referred, given))
    while pending:
        scope, selector = pending.pop()
        if (scope, selector) not in found:
            scopes = itertools.accumulate(scope.split("/"), lambda outer, inner: f"{outer}/{inner}")
            own = [bound.get(selector, {}), *(known.get((outer, selector), {}) for outer in scopes if outer)]
            found[scope, selector] = functools.reduce(operator.or_, own, _defaults(selector))
            pending += filter(None, map(_referred, found[scope, selector].values()))
    return {
        f"{scope}{'/' if scope else ''}{selector.rpartition('.')[2]}.{name}": text(value)
        for (scope, selector), parameters in found.items()
        for name, value in parameters.items()
    }


def _referred(value: object) -> tuple[str, str] | None:
    """Gives (scope, gin's name) of the function or class that a parameter's value refers to, if it does."""
    if isinstance(value, gin.config.ConfigurableReference):
        return None if _is_macro(value) else ("/".join(value.scopes), value.configurable.selector)
    configurable = gin.config._inverse_lookup(value) if callable(value) else None
    return ("", configurable.selector) if configurable else None


def _defaults(selector: str) -> dict[str, object]:
    """Gives the parameters that gin may set and that have a default, with their defaults."""
    configurable = gin.config._REGISTRY[selector]
    allowed, denied = configurable.allowlist, configurable.denylist or ()
    return {
        name: parameter.default
        for name, parameter in inspect.signature(configurable.wrapped).parameters.items()
        if parameter.default is not parameter.empty
        and name not in denied
        and (not allowed or name in allowed)
    }


def argument(function: Callable, name: str) -> object:
    """Gives what a parameter of a function is in a call that leaves it out.

    This is what `functools.partial` or gin binds, or the default; None where there is no such parameter.
    """
    if isinstance(function, functools.partial):
        return function.keywords[name] if name in function.keywords else argument(function.func, name)
    configurable = gin.config._inverse_lookup(function, allow_decorators=True)
    bound = gin.get_bindings(configurable.selector) if configurable else {}
    parameter = inspect.signature(function).parameters.get(name)
    return bound.get(name, parameter and parameter.default)


def operative_text() -> str:
    """Gives the parameters of all that was called so far, as a gin file."""
    return gin.operative_config_str()


@contextlib.contextmanager
def unrecorded() -> Iterator[None]:
    """Inside, calls leave no trace in `operative_text` and `texts_of_parameters`."""
    operative = gin.config._OPERATIVE_CONFIG
    recorded = {key: dict(parameters) for key, parameters in operative.items()}
    try:
        yield
    finally:
        operative.clear()
        operative.update(recorded)


def declare_scopes(names: values.Names) -> None:
    """Declares the gin scopes that a verb enters, so that `configure` refuses bindings in any other scope.

    Args:
      names: the scopes' names, and what they name, for messages.
    """
    _scopes.append(names)


def _check_scopes() -> None:
    """Raises UserError for a binding in a scope that no code enters and no `@SCOPE/…` names."""
    referred = {scope for _, leaf in _leaves() if not _is_macro(leaf) for scope in leaf.scopes}
    for scope, parameter in scoped():
        for part in scope.split("/"):
            if part not in referred and not any(names.holds(part) for names in _scopes):
                there = " or ".join(names.near(part) for names in _scopes)
                raise UserError(f"{parameter}: nothing enters the scope {part!r}: it must be {there}")


def scoped() -> list[tuple[str, str]]:
    """Returns (scope, SCOPE/FUNCTION.PARAMETER) of all bindings that hold in one scope alone."""
    return [
        (scope, f"{scope}/{selector.rpartition('.')[2]}.{parameter}")
        for (scope, selector), parameters in gin.config._CONFIG.items()
        if scope and not selector.startswith("gin.")
        for parameter in parameters
    ]


def _leaves() -> Iterator[tuple[str, gin.config.ConfigurableReference]]:
    """Yields (the name it is given to, reference) of every `%NAME` and `@FUNCTION` of the configuration."""
    for (scope, selector), parameters in gin.config._CONFIG.items():
        for parameter, value in parameters.items():
            for leaf in gin.config._iterate_flattened_values(value):
                if isinstance(leaf, gin.config.ConfigurableReference):
                    yield (
                        scope if selector == "gin.macro" else f"{selector.rpartition('.')[2]}.{parameter}",
                        leaf,
                    )


def _check_values() -> None:
    """Raises UserError for a value that does not fit its parameter's annotation."""
    for (_, selector), parameters in gin.config._CONFIG.items():
        if selector == "gin.macro":
            continue
        annotations = _annotations(gin.config._REGISTRY[selector].wrapped)
        for parameter, value in parameters.items():
            place = f"{selector.rpartition('.')[2]}.{parameter}"
            while _is_macro(value):
                place = "/".join(value.scopes)
                value = gin.query_parameter(f"%{place}")
            misfit = values.misfit(_resolved(value), annotations.get(parameter, typing.Any))
            if misfit:
                raise UserError(f"{place}: {misfit.value!r} is not {misfit.wanted}: set one that is")


def _resolved(value: object) -> object:
    """Returns a value with every `%NAME` in it replaced; the result of a `@FUNCTION` is not known yet."""
    if _is_macro(value):
        return _resolved(gin.query_parameter(f"%{'/'.join(value.scopes)}"))
    if isinstance(value, gin.config.ConfigurableReference):
        return values.ANY
    if isinstance(value, dict):
        return {_resolved(key): _resolved(one) for key, one in value.items()}
    return type(value)(map(_resolved, value)) if isinstance(value, list | tuple) else value


def _is_macro(value: object) -> bool:
    is_reference = isinstance(value, gin.config.ConfigurableReference)
    return is_reference and value.configurable.selector == "gin.macro"


def _annotations(function: Callable) -> dict[str, object]:
    """Returns the annotations of the parameters of a function or class that can be evaluated here."""
    called = function.__init__ if isinstance(function, type) else function
    try:
        return typing.get_type_hints(called, include_extras=True)
    except NameError:  # of a class that is not imported there
        return {
            name: parameter.annotation
            for name, parameter in inspect.signature(called).parameters.items()
            if parameter.annotation is not parameter.empty and not isinstance(parameter.annotation, str)
        }


def _one_number_of_steps() -> None:
    """If `train.steps` alone is set, gives its value to all that depends on STEPS, such as a schedule."""
    steps = gin.query_parameter("train.steps")
    if isinstance(steps, int):
        gin.parse_config(f"STEPS = {steps}")


def given() -> tuple[list[str], list[str]]:
    """Returns the files and the bindings of the last `configure`."""
    return _given


def _defined(macro: str) -> bool:
    try:
        gin.query_parameter(f"%{macro}")
    except ValueError:
        return False
    return True


@contextlib.contextmanager
def run_file(file: str | None, *settings: str) -> Iterator[None]:
    """A context in which a run file and settings hold, below the user's own files and bindings.

    Args:
      file: the gin file, which is read before the user's; None for none.
      settings: bindings that are read after the file and before the user's.
    """
    files, bindings = given()
    try:
        configure([*([file] if file else []), *files], [*settings, *bindings])
        yield
    finally:
        configure(files, bindings)


@contextlib.contextmanager
def _one_line(where: str) -> Iterator[None]:
    logging.disable(logging.ERROR)  # gin logs each folder where a file was not found
    try:
        yield
    except OSError as error:
        raise UserError(_no_file(error, where)) from None
    except UnicodeDecodeError:
        raise UserError(f"{where}: not UTF-8 text: name a gin file") from None
    except (ValueError, SyntaxError, TypeError, NameError, tokenize.TokenError) as error:
        said = str(error.args[0] if error.args else error).splitlines()[0].strip().rstrip(".")
        place, hint = _place(error, where), "`retrieval-jax VERB --help` lists the names"
        if unknown := re.match(r"No configurable matching (?:reference )?'@?([\w.]+)", said):
            hint = _meant_function(unknown[1].rpartition(".")[2])
        elif ".py:" in place and isinstance(error, SyntaxError):  # of a module that a gin file imports
            hint = "mend the line"
        elif re.search("malformed node|pars|Expected newline|EOF", said):
            said, hint = "not a value", f"write a number, or {QUOTES}"
        elif isinstance(error, SyntaxError):
            hint = "a setting is NAME = VALUE, a text in quotes"
        raise UserError(f"{place}: {said}: {hint}") from None
    finally:
        logging.disable(logging.NOTSET)


def _place(error: Exception, where: str) -> str:
    """Returns file and line of an error, if gin or Python tells them; `where` otherwise."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    place = re.search(r'In file "([^"]+)", line (\d+)', str(error))
    return f"{place[1]}:{place[2]}" if place else where


def _no_file(error: OSError, where: str) -> str:
    """Returns the message for a gin file, given or included, that cannot be opened."""
    name, place = re.search(r"Unable to open file: (.+?)\. Searched", str(error)), _place(error, where)
    if name and place != where:
        return (
            f"{place}: include {name[1]!r}: no such file: paths are from the working folder or gin_configs/"
        )
    there = sorted(str(p.relative_to(gin_folder())) for p in (gin_folder() / "runs").glob("*.gin"))
    why = "" if name else f" ({str(error).splitlines()[0]})"
    return (
        f"{where}: no such file{why}, from the working folder or gin_configs/: there are {', '.join(there)}"
    )


def _meant_function(name: str) -> str:
    """Returns the hint for a function or class that gin does not know."""
    known = [selector.rpartition(".")[2] for selector in gin.config._REGISTRY._selector_map]
    close = difflib.get_close_matches(name, known, 1)
    meant = f"did you mean {close[0]}?" if close else "`retrieval-jax VERB --help` lists the names."
    return f"{meant} A module of your own needs the line `import MODULE` in a gin file"
