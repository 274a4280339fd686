//! Stop texts: ends an answer where one of them begins, however the tokens split it.

/// What an answer may show after some more text arrived.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Passed {
    /// Text that no stop text can begin in any more; often empty.
    Text(String),
    /// The text before a stop text. The answer is over.
    Stopped(String),
}

/// Holds back what might be the beginning of a stop text.
#[derive(Clone, Debug)]
pub struct StopFilter {
    stops: Vec<String>,
    held: String,
}

impl StopFilter {
    /// A filter for some texts. Empty ones are left out: they would stop
    /// everything.
    pub fn new(stops: Vec<String>) -> Self {
        Self { stops: stops.into_iter().filter(|stop| !stop.is_empty()).collect(), held: String::new() }
    }

    /// Takes new text; returns what may be shown.
    pub fn push(&mut self, text: &str) -> Passed {
        self.held.push_str(text);
        // The earliest beginning wins, whichever text it is of.
        if let Some(at) = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min() {
            self.held.truncate(at);
            return Passed::Stopped(std::mem::take(&mut self.held));
        }
        let keep = self.stops.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0);
        let tail = self.held.split_off(self.held.len() - keep);
        Passed::Text(std::mem::replace(&mut self.held, tail))
    }

    /// Ends the answer; returns what was held back, as no stop text came of it.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Bytes at the end of `text` that are a beginning of `stop`; the longest such end.
fn overlap(text: &str, stop: &str) -> usize {
    let ends = stop.char_indices().map(|(at, _)| at).skip(1);
    ends.filter(|at| text.ends_with(&stop[..*at])).last().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Shows what a client sees when the text arrives in these pieces.
    fn shown(stops: &[&str], pieces: &[&str]) -> (String, bool) {
        let mut filter = StopFilter::new(stops.iter().map(|stop| (*stop).to_owned()).collect());
        let mut shown = String::new();
        for piece in pieces {
            match filter.push(piece) {
                Passed::Text(text) => shown.push_str(&text),
                Passed::Stopped(text) => return (shown + &text, true),
            }
        }
        (shown + &filter.finish(), false)
    }

    /// A stop text that is split over pieces in every possible way must be found and never shown.
    #[test]
    fn stop_texts_are_found_over_every_split() {
        let text = "one two\n\nthree \u{e9}\u{1f600}END tail";
        for stop in ["\n\n", "END", "\u{1f600}E", "tail"] {
            let expected = text.split(stop).next().unwrap();
            for first in 0..=text.len() {
                for second in first..=text.len() {
                    let cut = |from, to| text.get(from..to);
                    let (Some(a), Some(b), Some(c)) =
                        (cut(0, first), cut(first, second), cut(second, text.len()))
                    else {
                        continue;
                    };
                    assert_eq!(
                        shown(&[stop], &[a, b, c]),
                        (expected.to_owned(), true),
                        "{stop:?} {a:?} {b:?}"
                    );
                }
            }
        }
    }

    /// Text that only looks like the beginning of a stop text must come out in the end, unchanged.
    #[test]
    fn false_beginnings_are_shown() {
        let (text, stopped) = shown(&["aab", "xyz"], &["a", "a", "a", "c", "xy", "aa"]);
        assert_eq!((text.as_str(), stopped), ("aaacxyaa", false));
    }

    /// A beginning that repeats inside itself ("aab" in "aaab") must not hide the real one.
    #[test]
    fn overlapping_beginnings_are_found() {
        assert_eq!(shown(&["aab"], &["a", "a", "a", "b", "c"]), ("a".to_owned(), true));
    }

    /// Of several stop texts the one that begins first ends the answer, not the one listed first.
    #[test]
    fn the_earliest_beginning_wins() {
        assert_eq!(shown(&["late", "now"], &["right now or late"]), ("right ".to_owned(), true));
    }

    /// Without stop texts nothing may be held back: streams would lag.
    #[test]
    fn without_stops_text_passes_at_once() {
        let mut filter = StopFilter::new(vec![String::new()]);
        assert_eq!(filter.push("abc"), Passed::Text("abc".to_owned()));
    }
}
