"""Tasks stay apart whatever the characters of their instructions, and their names are fit for files."""

import pytest

from wav.data.names import LONGEST, full_name, in_libero, is_plain, joined, own_task, suites_of, task_in, task_name


@pytest.mark.parametrize(
    ("instruction", "name"),
    [
        ("Pick up the bowl", "pick_up_the_bowl"),
        ("  pick   up the bowl. ", "pick_up_the_bowl"),
        ("put the moka-pot on it", "put_the_moka_pot_on_it"),
        ("", ""),
    ],
)
def test_plain_instructions_keep_their_words(instruction, name):
    assert task_name(instruction) == name


def test_other_instructions_stay_apart_and_are_plain():
    instructions = [
        *(
            "把红色方块放进盒子",
            "把绿色方块放进盒子",
            "pósalo",
            "poşalo",
            "posalo",
            "go 1.5 m",
            "go 1,5 m",
            "go 15 m",
            "!",
        ),
        *("move -5 cm", "move 5 cm", "a/b", "a\\b", "a b", "../x", "x", "word " * 100 + "red", "word " * 100 + "blue"),
    ]
    names = [task_name(instruction) for instruction in instructions]
    assert len(set(names)) == len(instructions)
    assert all(is_plain(name) and len(name) <= LONGEST for name in names)
    assert [task_name(name) for name in names] == names
    assert task_name("p\u00f3salo") == task_name("po\u0301salo")  # one text in two encodings


def test_names_that_files_cannot_have_are_told():
    assert is_plain("KITCHEN_SCENE4_open_the_drawer")
    assert not any(is_plain(name) for name in ("", ".", "a/b", "a b", "盒子", "x" * (LONGEST + 1)))


def test_tasks_of_several_suites_carry_theirs():
    both = joined(["libero_goal", "libero_10"])
    assert (suites_of(both), in_libero(both), in_libero("libero_goal"), in_libero("libero_goal+tabletop")) == (
        ("libero_goal", "libero_10"),
        True,
        True,
        False,
    )
    assert task_in("libero_goal", "libero_goal", "turn_it") == "turn_it", "artefacts of one suite keep their names"
    name = task_in(both, "libero_goal", "turn_it")
    assert name == "libero_goal/turn_it"
    assert own_task(both, name) == own_task("libero_goal", "turn_it") == ("libero_goal", "turn_it")
    assert full_name(both, name) == full_name("libero_goal", "turn_it") == name
    assert is_plain(name)
    assert not any(is_plain(bad) for bad in ("libero_goal/", "libero_goal/.x", "../x", "libero_goal/a/b"))
