"""What a pass is: a function that changes a program it owns, and that callers see as one that makes a new program."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fxreuse.program import Program


class Pass:
    """A rewrite of a program. Called, it gives a new program; ``in_place`` changes the one that it is given.

    Several passes in a row copy and compile the program once, through `run_all`.
    """

    def __init__(self, in_place: Callable[[Program], None]) -> None:
        self.in_place = in_place
        self.__name__, self.__doc__, self.__module__ = in_place.__name__, in_place.__doc__, in_place.__module__

    def __call__(self, program: Program) -> Program:
        """The program after the rewrite; the one that is given is not changed."""
        return run_all((self,), program)


def run_all(steps: Sequence[Pass | Callable[[Program], Program]], program: Program) -> Program:
    """A new program, after all steps in order."""
    program = program.copy()
    for step in steps:
        if isinstance(step, Pass):
            step.in_place(program)
        else:
            program = step(program)
    program.module.recompile()
    return program
