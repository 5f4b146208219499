"""Rules on the source text: what a plugin must not do, found without running it."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from diffgraft.community.check.project import Project, Source
from diffgraft.community.check.rule import Problem, rule
from diffgraft.installed.plugin import POINTS

BASES = frozenset({"Plugin", "Watcher", "Calibrator", "Inverter"})
PER_STEP = frozenset({"control", "denoise", "block", "attention", "guide", "step"})
Function = ast.FunctionDef | ast.AsyncFunctionDef
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def dotted(node: ast.AST) -> str:
    """``a.b.c`` of names and attributes; "" for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        inner = dotted(node.value)
        return f"{inner}.{node.attr}" if inner else ""
    return ""


def classes_of(project: Project) -> dict[str, tuple[Source, ast.ClassDef]]:
    """The classes of the package by name."""
    return {node.name: (source, node) for source in project.sources for node in ast.walk(source.tree) if isinstance(node, ast.ClassDef)}


def plugin_classes(project: Project) -> list[tuple[Source, ast.ClassDef]]:
    """The package's classes that are plugins (or watchers, which are plugins too), through bases of its own."""
    known = classes_of(project)

    def is_plugin(node: ast.ClassDef, seen: frozenset[str] = frozenset()) -> bool:
        bases = {dotted(base).rpartition(".")[2] for base in node.bases} - seen
        return bool(bases & BASES) or any(is_plugin(known[base][1], seen | bases) for base in bases if base in known)

    return [(source, node) for source, node in known.values() if is_plugin(node)]


def methods(node: ast.ClassDef) -> list[Function]:
    return [item for item in node.body if isinstance(item, FUNCTIONS)]


# no per-run state on the plugin ----------------------------------------------------------------------------------------------------

CHANGING = frozenset({"append", "extend", "insert", "add", "update", "setdefault", "pop", "popitem", "remove", "discard", "clear"})


@rule("package")
def state_on_self(project: Project) -> Iterator[Problem]:
    """Hook methods keep nothing on the plugin: one plugin object serves every run, also two at once."""
    for source, node in plugin_classes(project):
        for method in methods(node):
            if method.name not in POINTS:
                continue
            me = method.args.args[0].arg if method.args.args else "self"
            for line, what in writes_to(method, me):
                yield Problem(
                    f"{node.name}.{method.name} writes {what}: it stays there after the run, and the next run sees it",
                    "keep it in call.state (of this run and branch) or call.shared (of this run); declare State",
                    source.where,
                    line,
                )


def writes_to(method: Function, me: str) -> Iterator[tuple[int, str]]:
    """(line, what) of every write to an attribute of ``me``, and of every global."""
    for node in ast.walk(method):
        if isinstance(node, (ast.Global, ast.Nonlocal)):
            yield node.lineno, f"the global {', '.join(node.names)}" if isinstance(node, ast.Global) else ", ".join(node.names)
        for target in targets_of(node):
            if isinstance(target, (ast.Attribute, ast.Subscript)) and root_of(target) == me:
                yield target.lineno, ast.unparse(target)
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CHANGING):
            continue
        if isinstance(node.func.value, (ast.Attribute, ast.Subscript)) and root_of(node.func.value) == me:
            yield node.lineno, ast.unparse(node.func.value)


def targets_of(node: ast.AST) -> list[ast.expr]:
    """What a statement assigns to or deletes, tuples taken apart."""
    if isinstance(node, (ast.Assign, ast.Delete)):
        targets = list(node.targets)
    elif isinstance(node, (ast.AugAssign, ast.AnnAssign, ast.For, ast.AsyncFor, ast.NamedExpr, ast.comprehension)):
        targets = [node.target]
    elif isinstance(node, ast.withitem):
        targets = [node.optional_vars] if node.optional_vars else []
    else:
        return []
    flat: list[ast.expr] = []
    while targets:
        target = targets.pop(0)
        if isinstance(target, (ast.Tuple, ast.List)):
            targets = [*target.elts, *targets]
        elif isinstance(target, ast.Starred):
            targets = [target.value, *targets]
        else:
            flat.append(target)
    return flat


def root_of(node: ast.AST) -> str:
    """The name that an attribute, subscript or call chain begins with."""
    while isinstance(node, (ast.Attribute, ast.Subscript, ast.Call)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


# no writes to foreign objects ------------------------------------------------------------------------------------------------------

REGISTERING = frozenset(
    {"register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook", "register_buffer", "register_parameter"}
    | {"set_attn_processor", "add_module", "register_module", "set_submodule", "enable_cache"}
)
HANDING_ON = frozenset({"getattr", "next", "vars", "iter", "enumerate", "zip", "reversed", "sorted", "list", "min", "max"})
"""Built-in functions whose result is, or holds, what they were given."""


@rule("package")
def foreign_writes(project: Project) -> Iterator[Problem]:
    """Nothing is written to an object that is not the plugin's: only the core patches, because only the core undoes."""
    own = frozenset(classes_of(project))
    for source in project.sources:
        for scope in scopes_of(source.tree, own):
            for line, what in foreign_writes_in(scope):
                yield Problem(
                    f"{what}: nobody undoes it when the plugin is taken off",
                    "use the hook point for it (`block`, `attention`, `denoise`, `modules` with call.swap), call.state for what is yours",
                    source.where,
                    line,
                )


@dataclass
class Scope:
    """One function (or a module's own level), and which of its names are objects of its own making."""

    nodes: list[ast.AST]
    own_classes: frozenset[str]
    owned: set[str] = field(default_factory=set)
    foreign: set[str] = field(default_factory=set)


def scopes_of(tree: ast.Module, own: frozenset[str]) -> Iterator[Scope]:
    """The module's level and every function, each without the functions inside it."""
    yield Scope(list(flat(tree.body)), own)
    for parent in ast.walk(tree):
        for node in ast.iter_child_nodes(parent):
            if isinstance(node, FUNCTIONS):
                yield scope_of(node, own, isinstance(parent, ast.ClassDef))


def flat(body: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """All nodes below, not into functions and classes."""
    for node in body:
        yield node
        if not isinstance(node, (*FUNCTIONS, ast.ClassDef, ast.Lambda)):
            yield from flat(ast.iter_child_nodes(node))


def scope_of(function: Function, own: frozenset[str], in_method: bool) -> Scope:
    """A function's scope. Its arguments are foreign, but for ``self`` and those annotated with a class of the package."""
    scope = Scope(list(flat(function.body)), own)
    arguments = function.args
    listed = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    static = any(dotted(decorator) == "staticmethod" for decorator in function.decorator_list)
    for number, argument in enumerate(listed):
        words = {n.id for n in ast.walk(argument.annotation) if isinstance(n, ast.Name)} if argument.annotation else set()
        mine = (in_method and number == 0 and not static) or bool(words & own)
        (scope.owned if mine else scope.foreign).add(argument.arg)
    for _ in range(2):  # a name may be used above the line that a loop binds it in
        for node in scope.nodes:
            bind(scope, node)
    return scope


def bind(scope: Scope, node: ast.AST) -> None:
    """Note whose objects the names are that this node binds."""
    value: ast.AST | None = None
    if isinstance(node, (ast.Assign, ast.AnnAssign, ast.NamedExpr)):
        value = node.value
    elif isinstance(node, (ast.For, ast.AsyncFor, ast.comprehension)):
        value = node.iter
    elif isinstance(node, ast.withitem):
        value = node.context_expr
    if value is None:
        return
    annotation = getattr(node, "annotation", None)
    declared = {n.id for n in ast.walk(annotation) if isinstance(n, ast.Name)} & scope.own_classes if annotation else set()
    mine = bool(declared) or is_own(value, scope)
    for target in targets_of(node):
        if isinstance(target, ast.Name):
            if mine:
                scope.owned.add(target.id)
                scope.foreign.discard(target.id)
            elif target.id not in scope.owned:
                scope.foreign.add(target.id)


def is_own(node: ast.AST, scope: Scope) -> bool:
    """Whether an expression is an object that the plugin made itself or that the core gave it to keep (``call.state``)."""
    if isinstance(node, ast.Name):
        return node.id not in scope.foreign and (node.id in scope.owned or node.id in scope.own_classes)
    if isinstance(node, ast.Attribute):
        if node.attr in ("state", "shared"):
            return True
        return is_own(node.value, scope)
    if isinstance(node, ast.Subscript):
        return is_own(node.value, scope)
    if isinstance(node, ast.Call):
        function = node.func
        if isinstance(function, ast.Name):  # a call makes something new, unless it only hands on what it got
            return function.id not in HANDING_ON or all(is_own(argument, scope) for argument in node.args)
        return root_of(function) not in scope.foreign or is_own(function, scope)
    if isinstance(node, ast.IfExp):
        return is_own(node.body, scope) and is_own(node.orelse, scope)
    if isinstance(node, ast.BoolOp):
        return all(is_own(value, scope) for value in node.values)
    return isinstance(node, (ast.Constant, ast.List, ast.Dict, ast.Set, ast.Tuple, ast.ListComp, ast.DictComp, ast.BinOp, ast.JoinedStr))


def foreign_writes_in(scope: Scope) -> Iterator[tuple[int, str]]:
    """(line, what) of writes that are not the scope's to make."""
    for node in scope.nodes:
        for target in targets_of(node):
            if isinstance(target, ast.Subscript) and isinstance(target.value, ast.Attribute) and target.value.attr == "__dict__":
                yield target.lineno, f"writes {ast.unparse(target)}"
            elif isinstance(target, ast.Attribute):
                if target.attr in ("forward", "__call__", "__class__"):
                    yield target.lineno, f"assigns {ast.unparse(target)}"
                elif not is_own(target.value, scope):
                    yield target.lineno, f"assigns {ast.unparse(target)}, which is not the plugin's"
        if isinstance(node, ast.Call):
            name = dotted(node.func)
            last = name.rpartition(".")[2] or getattr(node.func, "attr", "")
            if last in ("setattr", "delattr", "__setattr__", "__delattr__") and not (
                name in ("setattr", "delattr") and node.args and is_own(node.args[0], scope)
            ):
                yield node.lineno, f"calls {last} ({ast.unparse(node)[:60]})"
            elif last in REGISTERING and isinstance(node.func, ast.Attribute) and not is_own(node.func.value, scope):
                yield node.lineno, f"calls {last} on what is not the plugin's"


# no waiting for the device ---------------------------------------------------------------------------------------------------------

WAITING = frozenset({"item", "tolist", "cpu", "numpy"})
TENSORS = frozenset({"t", "sigma", "sample", "timestep", "latents", "model_output", "cond", "uncond", "combined"})
REDUCING = frozenset({"max", "min", "mean", "sum", "norm", "std", "var", "all", "any", "argmax", "argmin", "square", "sqrt", "abs"})


@rule("package")
def host_sync(project: Project) -> Iterator[Problem]:
    """Nothing in a step waits for the device: ``.item()``, ``.tolist()``, ``.cpu()``, ``float(tensor)``."""
    for source, function, chain in reached_in_a_step(project):
        tensors = {a.arg for a in function.args.args if a.annotation and "Tensor" in ast.unparse(a.annotation)}
        for node in ast.walk(function):
            if isinstance(node, ast.Assign) and looks_like_tensor(node.value, tensors):
                tensors |= {target.id for target in targets_of(node) if isinstance(target, ast.Name)}
        for node in ast.walk(function):
            if isinstance(node, ast.Call) and (what := waiting_call(node, tensors)):
                yield Problem(
                    f"{what} in {chain}: every step waits until the device has computed it, and torch.compile breaks there",
                    "stay on tensors (torch.where, 0-dim tensors), or read it once a run in `run` or `schedule`",
                    source.where,
                    node.lineno,
                )


def waiting_call(node: ast.Call, tensors: set[str]) -> str | None:
    """What of a call waits for the device, or None."""
    function = node.func
    if isinstance(function, ast.Attribute) and function.attr in WAITING and not node.args:
        return f".{function.attr}()"
    if isinstance(function, ast.Attribute) and function.attr == "synchronize":
        return "synchronize()"
    if len(node.args) != 1:
        return None
    [argument] = node.args
    if isinstance(function, ast.Attribute) and function.attr == "to" and isinstance(argument, ast.Constant) and argument.value == "cpu":
        return ".to('cpu')"
    if isinstance(function, ast.Name) and function.id in ("float", "int", "bool") and looks_like_tensor(argument, tensors):
        return f"{function.id}({ast.unparse(argument)})"
    return None


def looks_like_tensor(node: ast.AST, tensors: set[str]) -> bool:
    """Whether an expression is a tensor, as far as its text tells (the rule of effects sees the rest at run time)."""
    if isinstance(node, ast.Name):
        return node.id in tensors
    if isinstance(node, ast.Attribute):
        return node.attr in TENSORS and root_of(node) == "call"
    if isinstance(node, ast.Subscript):
        return looks_like_tensor(node.value, tensors)
    if isinstance(node, ast.BinOp):
        return looks_like_tensor(node.left, tensors) or looks_like_tensor(node.right, tensors)
    if isinstance(node, ast.UnaryOp):
        return looks_like_tensor(node.operand, tensors)
    if isinstance(node, ast.Call):
        if dotted(node.func).startswith("torch."):
            return True
        return isinstance(node.func, ast.Attribute) and node.func.attr in REDUCING and looks_like_tensor(node.func.value, tensors)
    return False


def reached_in_a_step(project: Project) -> Iterator[tuple[Source, Function, str]]:
    """(file, function, how it is reached) of the per-step hook methods of the plugin and of what they call in the package."""
    functions: dict[str, list[tuple[Source, Function]]] = {}
    for source in project.sources:
        for node in ast.walk(source.tree):
            if isinstance(node, FUNCTIONS):
                functions.setdefault(node.name, []).append((source, node))
    begin = [
        (source, method, f"{node.name}.{method.name}")
        for source, node in plugin_classes(project)
        if node.name == project.class_name
        for method in methods(node)
        if method.name in PER_STEP
    ]
    seen: set[int] = set()
    while begin:
        source, function, chain = begin.pop(0)
        if id(function) in seen:
            continue
        seen.add(id(function))
        yield source, function, chain
        names = {called for node in ast.walk(function) if isinstance(node, ast.Call) and (called := called_name(node))}
        for name in sorted(names - PER_STEP):
            begin += [(where, found, f"{name} (called from {chain})") for where, found in functions.get(name, [])]


def called_name(node: ast.Call) -> str | None:
    """The package's function that a call may lead to: ``f(...)``, ``self.f(...)``, ``module.f(...)``."""
    if isinstance(node.func, ast.Name):
        return node.func.id
    if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
        return node.func.attr
    return None


# no foreign code from files --------------------------------------------------------------------------------------------------------

PICKLES = frozenset({"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"})


@rule("package")
def unpickling(project: Project) -> Iterator[Problem]:
    """No file is unpickled: whoever made it could run anything on the reader's machine."""
    for source in project.sources:
        for node in ast.walk(source.tree):
            what = ""
            if isinstance(node, ast.Import):
                what = next((alias.name for alias in node.names if alias.name.partition(".")[0] in PICKLES), "")
            elif isinstance(node, ast.ImportFrom):
                what = node.module or "" if (node.module or "").partition(".")[0] in PICKLES else ""
                what = what or ("torch.load" if node.module == "torch" and any(alias.name == "load" for alias in node.names) else "")
            elif isinstance(node, ast.Call):
                name = dotted(node.func)
                what = name if name in ("torch.load", "torch.jit.load") else ""
                if name.endswith(("np.load", "numpy.load")) and any(
                    k.arg == "allow_pickle" and getattr(k.value, "value", True) for k in node.keywords
                ):
                    what = f"{name}(allow_pickle=True)"
            if what and isinstance(node, (ast.stmt, ast.expr)):
                yield Problem(
                    f"{what} can run code from a file",
                    "safetensors or JSON; `diffgraft.methods.artefacts` for what is measured",
                    source.where,
                    node.lineno,
                )
