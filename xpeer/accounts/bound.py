"""A home and its register: charges go to the register that holds the home's earlier ones.

Which register a command uses follows from its settings, its variables and its user. A home that is
used with another register by mistake would spend the budget of its documents again: what other
homes charged them is in the first one. So a ledger notes its register before its first charge, by
id and by path, and another one is refused.

A register that was moved keeps its id. One that was lost is begun anew at the same path. Both are
the home's register still.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

from xpeer.accounts.ledger import Ledger, place_of
from xpeer.accounts.register import Register
from xpeer.errors import ConfigError


def open_register(ledger: Ledger, folder: Path) -> Register:
    """Open the register that a home's charges go to, or begin it.

    Raises:
        ConfigError: the home's charges are in another register; or the folder can't be used.
        LocalError: the register or its key is damaged or missing, or they don't fit.
    """
    refuse_another(ledger, folder)
    return Register.open(folder)


def look_at_register(ledger: Ledger, folder: Path) -> Register | None:
    """Open the register of a home read-only; None if there is none.

    If its charges are in another one, and that is where it was, it is that one: nothing is charged
    to it, and a report would be wrong with any other. A ledger that notes no register is shown with
    any: reports count its own charges all the same.

    Raises:
        ConfigError: the home's charges are in another register, which is not there.
        LocalError: the register or its key is damaged or missing, or they don't fit.
    """
    noted = ledger.noted_register()
    if noted is not None:
        try:
            refuse_another(ledger, folder)
        except ConfigError:
            register = Register.look(Path(noted[1]))
            if register is None or register.id != noted[0]:
                if register is not None:
                    register.close()
                raise
            return register
    return Register.look(folder)


def refuse_another(ledger: Ledger, folder: Path) -> None:
    """Refuse a register that a home's charges are not in. Makes nothing.

    Raises:
        ConfigError: they are in another one.
        LocalError: the register or its key is damaged or missing, or they don't fit.
    """
    noted = ledger.noted_register()
    if not ledger.counter if noted is None else noted[1] == place_of(folder):
        return
    register = Register.look(folder)
    with register or nullcontext():
        if noted is not None:
            if register is None or register.id != noted[0]:
                raise _another(folder, f"this home's charges are in the one in {noted[1]}")
        elif register is None or not register.of_home(ledger.id):  # of a version that noted none
            raise _another(folder, "this home was charged before, and it knows nothing of that")


def use_register(ledger: Ledger, folder: Path) -> None:
    """Have a home go on with another register. It gets the ledger's charges at the next start.

    Raises:
        LocalError: the register is damaged, or the ledger can't be written.
    """
    register = Register.look(folder)
    with register or nullcontext():
        ledger.note_register("" if register is None else register.id, folder)


def _another(folder: Path, why: str) -> ConfigError:
    return ConfigError(
        f"privacy.register: {folder} is not this home's register: {why}",
        "set privacy.register (or XPEER_PRIVACY_REGISTER) as for the node that charged; if the "
        "register was moved, to its folder; if it is lost for good, `xpeer privacy use-register` "
        "has this home go on with this one",
    )
