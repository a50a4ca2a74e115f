"""FineVision's rows, made by hand: which turns each rating leaves, and where the images go."""

import pytest

from laver_mcore.data.errors import DataError
from laver_mcore.data.records.finevision import RATINGS, RatingFilter, finevision_turns, kept_turns
from laver_mcore.data.records.sample import Turn

TEXTS = [{"user": f"question {n}", "assistant": f"answer {n}"} for n in range(3)]
# A rating of its own for every turn and name; the last turn has none for one of them.
ROW = {
    "texts": TEXTS,
    "relevance_ratings": [5, 3, 1],
    "visual_dependency_ratings": [1, 4, 5],
    "image_correspondence_ratings": [4, None, 2],
    "formatting_ratings": [2, 5],
}

KEPT = {
    "nothing asked": ({}, [0, 1, 2]),
    "relevance": ({"relevance": 3}, [0, 1]),
    "relevance, one more": ({"relevance": 4}, [0]),
    "visual dependency": ({"visual_dependency": 4}, [1, 2]),
    "image correspondence, one not rated": ({"image_correspondence": 3}, [0, 1]),
    "formatting, the last not rated": ({"formatting": 3}, [1, 2]),
    "two at once": ({"relevance": 2, "visual_dependency": 2}, [1]),
    "all at their least": ({name: 1 for name in RATINGS}, [0, 1, 2]),
}


@pytest.mark.parametrize(("wanted", "turns"), KEPT.values(), ids=KEPT)
def test_turns_that_a_filter_keeps(wanted, turns):
    assert kept_turns(ROW, RatingFilter(**wanted)) == turns


@pytest.mark.parametrize(
    ("num_images", "question"),
    [(0, "question 1"), (1, "<image>\nquestion 1"), (2, "<image>\n<image>\nquestion 1")],
)
def test_images_stand_in_front_of_the_first_question_that_is_kept(num_images, question):
    turns = finevision_turns(ROW, num_images, RatingFilter(visual_dependency=2), "row 7")
    assert turns == (
        Turn("user", question),
        Turn("assistant", "answer 1"),
        Turn("user", "question 2"),
        Turn("assistant", "answer 2"),
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (ROW | {"texts": []}, "row 7: 'texts' is empty"),
        (ROW | {"relevance_ratings": [1, 1, 1]}, "row 7: no turn passes the rating filter"),
        ({"texts": [{"user": "why?"}]}, r"row 7: texts\[0\] lacks user or assistant"),
    ],
    ids=["no text", "none left", "no answer"],
)
def test_unusable_rows(row, message):
    with pytest.raises(DataError, match=message):
        finevision_turns(row, 0, RatingFilter(relevance=2), "row 7")
