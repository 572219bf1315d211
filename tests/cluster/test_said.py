"""What workers print: kept by whole lines, and no more of them than a person reads."""

from cluster.said import MOST_LINES, by_rank, heard, take_said


def test_lines_are_whole_and_taken_once() -> None:
    with heard():
        print("one\ntwo", "and more")
        print("thr", end="")
        first = take_said()
        print("ee")
        second, third = take_said(), take_said()
    assert (first, second, third) == (["one", "two and more"], ["three"], [])


def test_of_many_lines_the_newest_are_kept() -> None:
    with heard():
        for number in range(MOST_LINES + 7):
            print(number)
        taken = take_said()
        print("next")
        rest = take_said()
    assert taken == ["(7 lines before these)", *(str(n) for n in range(7, MOST_LINES + 7))]
    assert rest == ["next"]


def test_the_first_rank_needs_no_name() -> None:
    assert (by_rank(0, "a"), by_rank(3, "a")) == ("a", "rank 3: a")
    assert take_said() == []  # nothing is kept where nobody listens
