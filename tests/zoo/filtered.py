"""Lists of what experts made of their rows, without those that have none."""

from tests.zoo.case import Case
from tests.zoo.segments import SegmentBlock


class Filtered(SegmentBlock):
    """A comprehension with a condition."""

    def made(self, segments):
        return [expert(rows) for expert, rows in zip(self.experts, segments, strict=True) if len(rows)]

    def parts(self, rows, counts):
        return self.made(rows.split(counts.tolist()))


class Compared(Filtered):
    """The number of rows is compared, and experts are picked by their place."""

    def made(self, segments):
        return [self.experts[e](rows) for e, rows in enumerate(segments) if rows.shape[0] > 0]


class Appended(Filtered):
    """The same as a loop."""

    def made(self, segments):
        outputs = []
        for expert, rows in zip(self.experts, segments, strict=True):
            if rows.numel() > 0:
                outputs.append(expert(rows))
        return outputs


CASES = (
    Case("filtered_comprehension", Filtered),
    Case("filtered_compared", Compared),
    Case("filtered_appended", Appended),
)
