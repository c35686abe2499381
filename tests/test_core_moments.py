"""A method named after no moment is refused as its class is made."""

import pytest

from sfl.core.moments import check_moments


class Base:
    def on_round_started(self) -> None: ...


def test_a_misspelled_moment_names_the_nearest() -> None:
    check_moments(type("Right", (Base,), {"on_round_started": print, "helper": print}), Base)
    with pytest.raises(TypeError, match=r"Wrong.on_round_start must .* Did you mean on_round_started\?"):
        check_moments(type("Wrong", (Base,), {"on_round_start": print}), Base)
    with pytest.raises(TypeError, match=r"Did you mean on_round_started\?"):
        check_moments(type("Wrong", (Base,), {"on_x": print}), Base)
