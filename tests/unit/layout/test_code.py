from __future__ import annotations

import pytest

from shared.layout.code import Canon, definitions
from shared.layout.records import Unreadable

LINEAR = "class Linear(Module):\n  def forward(self: {0}.Linear) -> Tensor:\n    return 1\n"
NET = (
    "class Net(Module):\n  a : {0}.Linear\n  b : {1}.Linear\n"
    "  def forward(self: {2}.Net, x: Tensor) -> Tensor:\n    return (self.a).forward(x, )\n"
)


def program(root: str, files: dict[str, str]) -> list[str]:
    """The canonical text of files, by the names of their modules."""
    known = definitions({f"code/{name.replace('.', '/')}.py": files[name] for name in files})
    canon = Canon(known)
    return [canon.name(root), *canon.program()]


def function(body: str, kind: str = "def") -> list[str]:
    if kind == "def":
        return program("__torch__.f", {"__torch__": f"def f(x: Tensor) -> Tensor:\n{body}"})
    text = f"class M(Module):\n  def f(self, x: Tensor) -> Tensor:\n  {body}"
    return program("__torch__.M", {"__torch__": text})


def test_definitions_have_full_names():
    """Classes and functions are named by their file; the base says what a class is."""
    enum = "class C(Enum):\n  RED = 1\ndef f(x: Tensor) -> Tensor:\n  return x\n"
    known = definitions(
        {
            "code/__torch__.py": "class M(Module):\n  w : Tensor\n\nclass P:\n  x : int\n",
            "code/__torch__/a/b.py": enum,
        }
    )
    assert {name: each.kind for name, each in known.items()} == {
        "__torch__.M": "Module",
        "__torch__.P": "",
        "__torch__.a.b.C": "Enum",
        "__torch__.a.b.f": "def",
    }


def test_a_name_that_is_defined_twice_is_refused():
    """Nobody could tell which of the two is meant."""
    with pytest.raises(Unreadable, match="twice"):
        definitions({"code/__torch__.py": "class M:\n  a : int\nclass M:\n  b : int\n"})


def test_mangled_names_are_numbered_anew():
    """Two exports of one model from one process are the same program, though classes bear other
    numbers and lie in other files."""
    first, second, third = "__torch__.nn", "__torch__.nn.___torch_mangle_0", "__torch__"
    fresh = {
        third: NET.format(first, second, third),
        first: LINEAR.format(first),
        second: LINEAR.format(second),
    }
    first, second, third = (
        f"__torch__.{name}"
        for name in ("nn.___torch_mangle_7", "nn.___torch_mangle_11", "___torch_mangle_12")
    )
    later = {
        second: LINEAR.format(second),
        first: LINEAR.format(first),
        third: NET.format(first, second, third),
    }
    one, other = program("__torch__.Net", fresh), program(f"{third}.Net", later)
    assert one == other
    assert one[0] == "<0:__torch__.Net>"
    tied = {**later, third: NET.format(first, first, third)}
    assert program(f"{third}.Net", tied) != other


@pytest.mark.parametrize("kind", ["def", "class"])
def test_variables_are_numbered_anew(kind):
    """torch numbers variables over a whole file; in a function of their own the same ones have
    other numbers."""
    assert function("  _0 = torch.neg(x)\n", kind) == function("  _31 = torch.neg(x)\n", kind)
    assert function("  a0, b, = f(x)\n", kind) == function("  a, b1, = f(x)\n", kind)
    loop = "  for {0} in range(3):\n    print({0})\n"
    assert function(loop.format("i"), "def") == function(loop.format("i0"), "def")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("  a = g(x)\n  b = h(x)\n  return a\n", "  a = g(x)\n  b = h(x)\n  return b\n"),
        ("  a = g(x)\n  return f(a, a=1)\n", "  b = g(x)\n  return f(b, b=1)\n"),
        ("  a = g(x)\n  return a.a\n", "  b = g(x)\n  return b.b\n"),
        ('  a = g(x)\n  return h("a")\n', '  b = g(x)\n  return h("b")\n'),
        ("  x = g(x)\n", "  y = g(x)\n"),
        ("  a = g(x)\n  return c\n", "  c = g(x)\n  return c\n"),
        ("  a = 1\n", "  a = 2\n"),
        (
            "  a = g(x)\n  b = h(x)\n  def k() -> Tensor:\n    return a\n",
            "  b = g(x)\n  a = h(x)\n  def k() -> Tensor:\n    return a\n",
        ),
    ],
)
def test_different_programs_stay_different(one, other):
    """Renaming loses nothing: not which variable is used, no keyword, attribute or text, and
    no variable of an outer function."""
    assert function(one) != function(other)


def test_names_in_texts_are_no_names():
    """What stands in quotes is kept as it is."""
    assert '"__torch__.f"' in function('  return g("__torch__.f")\n')[-1]


def test_what_nobody_mentions_still_counts():
    """Code that is not reached makes a difference; one cannot be too careful."""
    files = {"__torch__": "def f(x: Tensor) -> Tensor:\n  return x\n"}
    more = {**files, "__torch__.g": "def g(x: Tensor) -> Tensor:\n  return x\n"}
    assert program("__torch__.f", files) != program("__torch__.f", more)


def test_values_of_enums_and_strangers():
    """`__torch__.Color.RED` is the class and a value of it; unknown names stay."""
    canon = Canon(definitions({"code/__torch__.py": "class Color(Enum):\n  RED = 1\n"}))
    assert canon.name("__torch__.Color.RED") == "<0:__torch__.Color>.RED"
    assert canon.name("__torch__.torch.classes.x.Y") == "__torch__.torch.classes.x.Y"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("  {0} = 3\n  return f(x,\n    {0} = 3)\n", ("alpha", "beta")),
        ("  {0} = 3\n  return f(x, {0} = 3)\n", ("alpha", "beta")),
        ("  {0} = f(x, {0} = 3)\n  return x\n", ("alpha", "beta")),
        ("  {0} = 3\n  return f(x, {0} =3)\n", ("alpha", "beta")),
        ("  {0} = g(x)\n  return x. {0}\n", ("a", "b")),
        ("  {0} = g(x)\n  return h('{0}')\n", ("a", "b")),
        ('  {0} = g(x)\n  return h("""\n{0}""")\n', ("a", "b")),
        ("  {0} = g(x)\n  return x.\\\n{0}\n", ("a", "b")),
        ("  # for {0} in \n  return {0}(x)\n", ("neg", "abs")),
        ("  y = {0}(x)\n  {0} = 3\n  return y\n", ("min", "max")),
        ("  y = mul(x, {0})\n  {0} = 3\n  return y\n", ("inf", "nan")),
        ("  {0} = 3\n  y = annotate(List[{0}], [])\n  return y\n", ("int", "float")),
        ("  {0} = 3\n  y = annotate({0}, x)\n  return y\n", ("Tensor", "Device")),
    ],
)
def test_what_only_looks_like_a_variable_makes_a_difference(one, other):
    """A keyword, an attribute, a text, a function, a constant, a type: code that somebody wrote
    so by hand is refused, or keeps its names."""
    keys = []
    for name in other:
        try:
            keys.append(function(one.format(name)))
        except Unreadable:
            continue
    assert len(keys) < 2 or keys[0] != keys[1]


def test_what_would_look_numbered_is_refused():
    """Else a program that nothing can run could stand in for a good one."""
    for body in ("  $0 = neg(x)\n", "  return <0:__torch__.f>(x)\n"):
        with pytest.raises(Unreadable, match="as torch writes"):
            function(body)


def test_a_preamble_is_a_part_of_every_definition():
    """Whatever stands before the definitions of a file makes a difference to each."""
    text = "{}def f(x: Tensor) -> Tensor:\n  return x\n"
    keys = {
        tuple(program("__torch__.f", {"__torch__": text.format(before)}))
        for before in ("", "op_version_set = 0\n", "op_version_set = 1\n")
    }
    assert len(keys) == 3
