//! What an engine's replay socket can give: the batches that a connection missed.
//!
//! A publisher answers a question by all that it remembers from a number on, as fast as it
//! can, and its socket throws away what does not fit: batches in the middle, or the end of
//! the answer with the mark that ends it. So an answer with a hole, and one that falls silent
//! after it brought something, are followed by a question for the rest.
//!
//! Promises: a publisher's batches are taken in order; questions end as soon as they bring
//! nothing new; what was had stays when the rest cannot be had, and the rest is asked for
//! again after a pause. Each question but the first begins with a batch that is known, so
//! that another process at the same address is not taken for the one before.

use std::time::Duration;

use bytes::Bytes;
use tokio::time::{Instant, timeout_at};

use super::{Batch, Topics, message, open};
use crate::engines::publisher::Publisher;
use crate::zmtp::address::Address;
use crate::zmtp::{Kind, LinkError};

#[cfg(test)]
mod tests;

/// What ends a replay, as a number.
const REPLAY_END: u64 = u64::MAX;
/// Most answers of one replay that may break off.
const BREAKS_MAX: usize = 16;
/// So much longer than a question took in vain is the pause after it: the rest of the time is for what is new.
const PAUSE_SHARE: u32 = 10;

#[derive(Clone, Copy, Debug)]
struct Times {
    /// How long one answer may take.
    answer: Duration,
    /// How long an answer that has brought something may be silent.
    silence: Duration,
    /// How long nobody is asked after a question in vain; doubles up to the second.
    pause_min: Duration,
    pause_max: Duration,
}

const TIMES: Times = Times {
    answer: Duration::from_secs(30),
    silence: Duration::from_secs(2),
    pause_min: Duration::from_secs(1),
    pause_max: Duration::from_secs(60),
};

/// The replay socket of a publisher, as long as one connection to its events.
pub(super) struct Replay<'a> {
    address: &'a Address,
    times: Times,
    pause: Duration,
    /// When to ask for what could not be had; none if all was.
    due: Option<Instant>,
}

/// What a batch of an answer is to whoever asked.
enum Heard {
    New,
    Known,
    /// It is not taken, and no more is read.
    Enough,
}

/// How an answer ended.
enum Ended {
    /// By its mark.
    Whole,
    /// By us.
    Left,
}

/// Waits until a replay that failed is to be tried again; for ever if there is none.
pub(super) async fn due<'r, 'a>(replay: &'r mut Option<Replay<'a>>) -> &'r mut Replay<'a> {
    match replay {
        Some(replay) if replay.due.is_some() => {
            tokio::time::sleep_until(replay.due.expect("it was just seen")).await;
            replay
        }
        Some(_) | None => std::future::pending().await,
    }
}

impl<'a> Replay<'a> {
    pub(super) fn new(address: &'a Address) -> Self {
        Self { address, times: TIMES, pause: TIMES.pause_min, due: None }
    }

    /// After a connection, and again where that failed: goes on behind the last batch if that is still the
    /// publisher's, else begins anew with all that it can replay.
    pub(super) async fn catch_up(&mut self, topics: &mut Topics) {
        let began = Instant::now();
        let had = self.all(topics).await;
        self.settle(topics, began, had);
    }

    /// Has the batches from a number on, before one that came too early, and then takes that one.
    pub(super) async fn fill(&mut self, topics: &mut Topics, early: &Batch, from: u64) {
        let began = Instant::now();
        let had = self.rest(topics, from).await;
        // What came is certain, and the early batch can be had by the next question as well.
        let is_ahead = topics.last(&early.topic) >= Some(from);
        if had.is_ok() || !is_ahead {
            topics.lacks_start |= had.is_err();
            topics.take_anyway(early);
        }
        self.settle(topics, began, had);
    }

    fn settle(&mut self, topics: &Topics, began: Instant, had: Result<(), LinkError>) {
        let Err(error) = had else {
            // A gap that was filled says nothing of what came before all that is known.
            if !topics.lacks_start {
                (self.due, self.pause) = (None, self.times.pause_min);
            }
            return;
        };
        let engine = &topics.spec.name;
        if self.due.is_none() {
            tracing::warn!(engine, %error, "an engine's replay cannot be had to its end; it is asked for again");
        } else {
            tracing::debug!(engine, %error, "an engine's replay cannot be had to its end again");
        }
        self.due = Some(Instant::now() + self.pause.max(began.elapsed() * PAUSE_SHARE));
        self.pause = (self.pause * 2).min(self.times.pause_max);
    }

    async fn all(&self, topics: &mut Topics) -> Result<(), LinkError> {
        let last = match &topics.publishers.values().collect::<Vec<_>>()[..] {
            // One process numbers its batches over all topics, so several cannot be told apart.
            [publisher] if !topics.lacks_start => publisher.last(),
            _ => None,
        };
        if topics.knows() {
            let mut is_same = false;
            let asked = self.ask(topics, last.unwrap_or(0), |topics, batch| {
                let known = topics.publishers.get(&batch.topic);
                is_same =
                    last.is_some() && known.is_some_and(|known| known.is_last(batch.number, &batch.payload));
                Heard::Enough
            });
            match (asked.await, last) {
                (Ok(_), Some(last)) if is_same => return self.rest(topics, last + 1).await,
                (Ok(_), _) => topics.forget(),
                // All that is known came by this connection, so it stays.
                (Err(error), _) if topics.lacks_start => return Err(error),
                (Err(error), _) => {
                    topics.forget();
                    topics.lacks_start = true;
                    return Err(error);
                }
            }
        }
        let had = self.rest(topics, 0).await;
        topics.lacks_start = had.is_err() && !topics.knows();
        had
    }

    /// Takes the batches from a number on. Fails where the publisher says nothing new, and has not said that
    /// there is nothing.
    async fn rest(&self, topics: &mut Topics, from: u64) -> Result<(), LinkError> {
        let (mut next, mut first, mut breaks) = (from, from, 0);
        loop {
            let (known, mut is_other) = (next, false);
            let ended = self.ask(topics, first, |topics, batch| {
                let publisher = topics.publishers.get(&batch.topic);
                if batch.number < known {
                    let is_last = |one: &Publisher| one.is_last(batch.number, &batch.payload);
                    is_other |= first < known && batch.number == first && !publisher.is_some_and(is_last);
                    return if is_other { Heard::Enough } else { Heard::Known };
                }
                let last = publisher.and_then(Publisher::last);
                let is_behind_hole = last.is_some_and(|last| batch.number > last + 1);
                // A socket has room for the begin of an answer: what is missing there is gone.
                if is_behind_hole && next > known {
                    return Heard::Enough;
                }
                next = next.max(batch.number + 1);
                Heard::New
            });
            match ended.await {
                Ok(Ended::Whole) => return Ok(()),
                Ok(Ended::Left) if is_other => return Err(LinkError::Peer("is another one by now")),
                Ok(Ended::Left) => {}
                Err(LinkError::Silent | LinkError::Io(_)) if next > known && breaks < BREAKS_MAX => {
                    breaks += 1
                }
                Err(error) => return Err(error),
            }
            first = next - 1;
        }
    }

    /// Asks for the batches from a number on, and takes them as long as `hear` says so.
    async fn ask(
        &self,
        topics: &mut Topics,
        from: u64,
        mut hear: impl FnMut(&Topics, &Batch) -> Heard,
    ) -> Result<Ended, LinkError> {
        let end = Instant::now() + self.times.answer;
        let asked = async {
            let (reader, mut writer) = open(self.address, Kind::Dealer).await?;
            writer.send_message(&[Bytes::new(), Bytes::copy_from_slice(&from.to_be_bytes())]).await?;
            Ok::<_, LinkError>((reader, writer))
        };
        let (mut reader, mut writer) = timeout_at(end, asked).await.map_err(|_| LinkError::Silent)??;
        let mut has_brought = false;
        loop {
            let silent = if has_brought { end.min(Instant::now() + self.times.silence) } else { end };
            let next = timeout_at(silent, message(&mut reader, &mut writer)).await;
            let Some(batch) = batch(topics, &next.map_err(|_| LinkError::Silent)??)? else {
                return Ok(Ended::Whole);
            };
            if !batch.topic.starts_with(topics.spec.topic.as_bytes()) {
                continue;
            }
            match hear(topics, &batch) {
                Heard::Enough => return Ok(Ended::Left),
                Heard::New => has_brought = true,
                Heard::Known => {}
            }
            topics.take_anyway(&batch);
        }
    }
}

/// A batch of an answer; none if it is the end.
fn batch(topics: &Topics, message: &[Bytes]) -> Result<Option<Batch>, LinkError> {
    const STRANGE: LinkError = LinkError::Peer("answers a replay with something else");
    // Older engines leave out the topic.
    let (topic, number, payload) = match message {
        [_, topic, number, payload] => (topic.clone(), number, payload),
        [_, number, payload] => {
            (topics.publishers.keys().next().cloned().unwrap_or_default(), number, payload)
        }
        _ => return Err(STRANGE),
    };
    let number = <[u8; 8]>::try_from(&number[..]).map(u64::from_be_bytes).map_err(|_| STRANGE)?;
    Ok((number != REPLAY_END).then(|| Batch { topic, number, payload: payload.clone() }))
}
