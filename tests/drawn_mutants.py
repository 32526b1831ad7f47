"""Every small edit of a source that may make it wrong, drawn from its syntax tree.

    what                    | edit
    operator                | its opposite or neighbour (OTHER), at every place
    and, or                 | the other one
    not, - and ~ before     | left out
    number                  | an integer plus 1; another number doubled, and 0.0 becomes 1.0
    True, False             | the other one
    neighbouring arguments  | swapped, of positional ones
    statement               | pass
    default                 | None (None becomes 0); a number or truth value is edited as above

Edits are replacements in the text, never a new print of the tree: line numbers, comments and all
other characters stay as they are. Left alone is what cannot compute anything: docstrings, type
annotations, imports, the messages of raise, and what is written inside f-strings. Nor is an edit
drawn that changes nothing: the order of arguments of which all orders are the same (SYMMETRIC,
OF_NAMES), and zip's strict, a guard for lists whose lengths are always the same.
"""

import ast
import re
from typing import NamedTuple

OTHER = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "/"),
    ast.Mod: ("%", "*"),
    ast.Pow: ("**", "*"),
    ast.MatMult: ("@", "*"),
    ast.BitOr: ("|", "&"),
    ast.BitAnd: ("&", "|"),
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
    ast.And: ("and", "or"),
    ast.Or: ("or", "and"),
}
# Functions and methods whose arguments may come in any order; of the second ones, the strings may.
SYMMETRIC = ("max", "min", "equal", "mse_loss", "transpose", "promote_types")
OF_NAMES = ("named", "in_base_dtype")
BEFORE = {ast.Not: "not ", ast.USub: "-", ast.Invert: "~"}
SIMPLE = (ast.Assign, ast.AugAssign, ast.Expr, ast.Return, ast.Raise, ast.Delete, ast.Continue,
          ast.Break, ast.Assert, ast.For, ast.While, ast.If, ast.With, ast.Try)  # fmt: skip


class Mutant(NamedTuple):
    """One edit. Its place is in characters; where is the function, "" outside of all."""

    start: int
    line: int  # counted from 1
    old: str
    new: str
    what: str
    where: str

    def apply(self, source):
        """The source with this edit."""
        end = self.start + len(self.old)
        return source[: self.start] + self.new + source[end:]

    def lines(self, source):
        """What is edited and what comes of it: all lines it touches, each as one of single spaces.

        A statement that is deleted is shown by its first line.
        """
        end = self.start + len(self.old)
        first, last = source.rfind("\n", 0, self.start) + 1, source.find("\n", end)
        last = len(source) if last < 0 else last
        if self.what == "statement":
            return source[first:last].strip().splitlines()[0], "pass"
        before, after = source[first:last], source[first : self.start] + self.new + source[end:last]
        return " ".join(before.split()), " ".join(after.split())


def draw(source):
    """list of Mutant: every one that there is, in the order of their places."""
    drawing = Drawing(source)
    drawing.visit(ast.parse(source))
    return sorted(drawing.found)


def listed(text):
    """The entries of survivors.txt: {(file, function, line before, line after): reason}.

    Raises:
        ValueError: an entry that is not of four lines, each with what belongs in it.
    """
    result = {}
    for entry in text.split("\n\n")[1:]:  # the first paragraph says what this is
        place, *lines = entry.strip().splitlines()
        if [line[:2] for line in lines] != ["- ", "+ ", "= "] or not all(x[2:] for x in lines):
            raise ValueError(f"expected 'file function', '- …', '+ …', '= …', got:\n{entry}")
        before, after, reason = (line[2:] for line in lines)
        file, _, function = place.partition(" ")
        result[file, function, before, after] = reason
    return result


class Drawing(ast.NodeVisitor):
    """The walk through the tree, which knows in what function it is."""

    def __init__(self, source):
        self.source, self.found, self.functions = source, [], []
        self.starts = [0]  # of each line, in characters
        for line in source.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        self.lines = source.splitlines()

    # --------------------------------------------------------------------------------- places

    def place(self, line, column):
        """A position of ast, whose columns are bytes, in characters of the source."""
        before = self.lines[line - 1].encode()[:column].decode()
        return self.starts[line - 1] + len(before)

    def span(self, node):
        """(start, end)"""
        start = self.place(node.lineno, node.col_offset)
        return start, self.place(node.end_lineno, node.end_col_offset)

    def add(self, start, old, new, what):
        if old != new:
            line = self.source.count("\n", 0, start) + 1
            self.found.append(Mutant(start, line, old, new, what, ".".join(self.functions)))

    def replace(self, node, new, what):
        start, end = self.span(node)
        self.add(start, self.source[start:end], new, what)

    def operator(self, op, left, right):
        """The operator between two operands: around it are spaces, brackets and comments alone."""
        old, new = OTHER.get(type(op), (None, None))
        if old:
            start, end = self.span(left)[1], self.span(right)[0]
            between = self.source[start:end]
            between = re.sub(r"#.*", lambda comment: " " * len(comment[0]), between)
            self.add(start + between.index(old), old, new, "operator")

    # ---------------------------------------------------------------------------------- nodes

    def generic_visit(self, node):
        if isinstance(node, SIMPLE) and not is_text(node):
            self.replace(node, "pass", "statement")
        super().generic_visit(node)

    def visit_ClassDef(self, node):
        self.functions.append(node.name)
        if isinstance(node, ast.FunctionDef):
            node.returns = None  # an annotation
            for default in node.args.defaults + node.args.kw_defaults:
                self.default(default)
        self.generic_visit(node)
        self.functions.pop()

    visit_FunctionDef = visit_ClassDef

    def default(self, node):
        """Of an argument or a field; numbers and truth values are edited wherever they stand."""
        text = isinstance(node, ast.Constant) and isinstance(node.value, str)
        if text or isinstance(node, ast.Tuple | ast.Name | ast.Attribute):
            self.replace(node, "None", "default")
        elif isinstance(node, ast.Constant) and node.value is None:
            self.replace(node, "0", "default")

    def visit_arg(self, node):
        """Nothing: a name and an annotation."""

    def visit_arguments(self, node):
        for default in filter(None, node.defaults + node.kw_defaults):
            self.visit(default)

    def visit_AnnAssign(self, node):
        if node.value:
            self.default(node.value)
            self.visit(node.value)

    def visit_Import(self, node):
        """Nothing."""

    visit_ImportFrom = visit_JoinedStr = visit_Import

    def visit_Raise(self, node):
        self.replace(node, "pass", "statement")

    def visit_BinOp(self, node):
        if not is_text(node.left):
            self.operator(node.op, node.left, node.right)
        self.generic_visit(node)

    def visit_AugAssign(self, node):
        self.operator(node.op, node.target, node.value)
        self.generic_visit(node)

    def visit_Compare(self, node):
        operands = [node.left, *node.comparators]
        for op, left, right in zip(node.ops, operands, operands[1:], strict=False):
            self.operator(op, left, right)
        self.generic_visit(node)

    def visit_BoolOp(self, node):
        for left, right in zip(node.values, node.values[1:], strict=False):
            self.operator(node.op, left, right)
        self.generic_visit(node)

    def visit_UnaryOp(self, node):
        old = BEFORE.get(type(node.op))
        if old:
            self.add(self.span(node)[0], old, "", "operator")
        self.generic_visit(node)

    def visit_Constant(self, node):
        if isinstance(node.value, bool):
            self.replace(node, str(not node.value), "truth value")
        elif isinstance(node.value, int):
            self.replace(node, str(node.value + 1), "number")
        elif isinstance(node.value, float):
            self.replace(node, repr(node.value * 2 or 1.0), "number")

    def visit_Call(self, node):
        name = getattr(node.func, "id", getattr(node.func, "attr", ""))
        if name == "zip":
            node.keywords = []
        if name not in SYMMETRIC:
            for left, right in zip(node.args, node.args[1:], strict=False):
                starred = isinstance(left, ast.Starred) or isinstance(right, ast.Starred)
                names = name in OF_NAMES and is_text(left) and is_text(right)
                if not starred and not names:
                    (start, middle), (other, end) = self.span(left), self.span(right)
                    a, gap, b = (
                        self.source[i:j]
                        for i, j in ((start, middle), (middle, other), (other, end))
                    )
                    if a != b:
                        self.add(start, a + gap + b, b + gap + a, "neighbouring arguments")
        self.generic_visit(node)


def is_text(node):
    """A docstring, as a statement; or a string, before % or in place of it."""
    value = node.value if isinstance(node, ast.Expr) else node
    return isinstance(value, ast.JoinedStr) or (
        isinstance(value, ast.Constant) and isinstance(value.value, str)
    )
