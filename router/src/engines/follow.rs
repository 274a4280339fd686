//! The sockets of one engine: events, and the replay of what was missed.
//!
//! A publisher that listens is connected to, over and over. One that comes to us may
//! share our port with others, so its topic tells it from them, and of two with the
//! same topic the newer one counts.
//!
//! After each connection the replay socket must give the last batch again; if it
//! cannot, the publisher may be another process by now, and begins anew. One that is
//! away for long holds nothing.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::{Instant, timeout};

use super::holders::Holders;
use super::publisher::{Publisher, Shown, Taken};
use super::spec::{Events, Spec};
use crate::zmtp::address::Address;
use crate::zmtp::link::{self, Reader, Sent, Writer};
use crate::zmtp::{Kind, LinkError, Message};

mod bound;

const CONNECT_TIME_MAX: Duration = Duration::from_secs(5);
/// How long a whole replay may take.
const REPLAY_TIME_MAX: Duration = Duration::from_secs(30);
const PAUSE_MIN: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(5);
/// A connection that held so long was a good one: the next pause is short again.
const HELD: Duration = Duration::from_secs(10);
/// Most topics of one engine.
const TOPICS_MAX: usize = 64;
const TOPIC_BYTES_MAX: usize = 256;
/// What ends a replay, as a number.
const REPLAY_END: u64 = u64::MAX;

/// Follows one engine. Never ends; may be dropped at any time.
pub(super) async fn follow(spec: Arc<Spec>, holders: Arc<Holders>, shown: Arc<Shown>, lost_after: Duration) {
    let topics = Topics { spec: Arc::clone(&spec), holders, shown, publishers: BTreeMap::new() };
    match &spec.events {
        Events::Connect { address, replay } => connect(topics, address, replay.as_ref(), lost_after).await,
        Events::Bind { address } => bound::listen(topics, address, lost_after).await,
    }
}

/// The publishers of one engine by their topics.
struct Topics {
    spec: Arc<Spec>,
    holders: Arc<Holders>,
    shown: Arc<Shown>,
    publishers: BTreeMap<Bytes, Publisher>,
}

/// A batch as it came.
struct Batch {
    topic: Bytes,
    number: u64,
    payload: Bytes,
}

impl Topics {
    /// The publisher of a topic, made if it is new; none if there are too many.
    fn publisher(&mut self, topic: &Bytes) -> Option<&mut Publisher> {
        if !self.publishers.contains_key(topic) {
            if self.publishers.len() == TOPICS_MAX || topic.len() > TOPIC_BYTES_MAX {
                return None;
            }
            let engine = &self.spec.name;
            let shown = String::from_utf8_lossy(topic);
            let name = if topic.is_empty() { engine.clone() } else { format!("{engine}/{shown}") };
            let publisher = Publisher::new(name, Arc::clone(&self.holders), Arc::clone(&self.shown));
            // The topic is a slice of a message, which need not be kept.
            self.publishers.insert(Bytes::copy_from_slice(topic), publisher);
        }
        self.publishers.get_mut(topic)
    }

    /// A message as a batch; counted if it is none.
    fn batch(&self, message: &Message) -> Option<Batch> {
        let batch = match &message[..] {
            [topic, number, payload] if topic.starts_with(self.spec.topic.as_bytes()) => {
                let number = <[u8; 8]>::try_from(&number[..]).ok().map(u64::from_be_bytes);
                number.map(|number| Batch { topic: topic.clone(), number, payload: payload.clone() })
            }
            _ => None,
        };
        if batch.is_none() {
            Shown::count(&self.shown.bad);
        }
        batch
    }

    /// Takes a batch before which nothing can be had: what its publisher held is not to be believed.
    fn take_anyway(&mut self, batch: &Batch) {
        let Some(publisher) = self.publisher(&batch.topic) else {
            return Shown::count(&self.shown.bad);
        };
        if let Taken::Gap { .. } = publisher.take(batch.number, &batch.payload) {
            publisher.forget();
            publisher.take(batch.number, &batch.payload);
        }
    }

    fn forget(&mut self) {
        self.publishers.values_mut().for_each(Publisher::forget);
    }
}

async fn connect(mut topics: Topics, address: &Address, replay: Option<&Address>, lost_after: Duration) {
    let (mut pause, mut seen) = (PAUSE_MIN, Instant::now());
    loop {
        let began = Instant::now();
        let ended = round(&mut topics, address, replay).await;
        let was_connected = topics.shown.connected.swap(false, Ordering::Relaxed);
        if was_connected {
            seen = Instant::now();
            let engine = &topics.spec.name;
            tracing::warn!(engine, error = %ended, "the connection to an engine's events ended");
        }
        if seen.elapsed() > lost_after {
            topics.forget();
        }
        pause = if began.elapsed() > HELD { PAUSE_MIN } else { (pause * 2).min(PAUSE_MAX) };
        tokio::time::sleep(pause.min(lost_after)).await;
    }
}

/// One connection to its end.
async fn round(topics: &mut Topics, address: &Address, replay: Option<&Address>) -> LinkError {
    let opened = async {
        let (reader, mut writer) = open(address, Kind::Sub).await?;
        writer.subscribe(topics.spec.topic.as_bytes()).await?;
        Ok((reader, writer))
    };
    let (mut reader, mut writer) = match opened.await {
        Ok(link) => link,
        Err(error) => return error,
    };
    topics.shown.connected.store(true, Ordering::Relaxed);
    tracing::info!(engine = topics.spec.name, %address, "an engine's events are followed");
    match replay {
        Some(replay) => catch_up(topics, replay).await,
        None => topics.forget(),
    }
    loop {
        let message = match message(&mut reader, &mut writer).await {
            Ok(message) => message,
            Err(error) => return error,
        };
        let Some(batch) = topics.batch(&message) else { continue };
        let taken =
            topics.publisher(&batch.topic).map(|publisher| publisher.take(batch.number, &batch.payload));
        let Some(Taken::Gap { from }) = taken else { continue };
        Shown::count(&topics.shown.gaps);
        if let Some(replay) = replay
            && let Err(error) = recover(topics, replay, from).await
        {
            tracing::warn!(engine = topics.spec.name, %error, "what was missed cannot be had");
        }
        topics.take_anyway(&batch);
    }
}

async fn open(address: &Address, kind: Kind) -> Result<(Reader, Writer), LinkError> {
    let stream = timeout(CONNECT_TIME_MAX, address.connect()).await.map_err(|_| LinkError::Silent)??;
    link::open(stream, kind).await
}

/// The next message; pings are answered.
async fn message(reader: &mut Reader, writer: &mut Writer) -> Result<Message, LinkError> {
    loop {
        let sent = reader.next().await?;
        let pongs = reader.pongs();
        if !pongs.is_empty() {
            writer.send(&pongs).await?;
        }
        if let Sent::Message(message) = sent {
            return Ok(message);
        }
    }
}

/// After a connection: goes on behind the last batch if that is still the publisher's, else begins anew with
/// all that it can replay.
async fn catch_up(topics: &mut Topics, replay: &Address) {
    let last = match &mut topics.publishers.values_mut().collect::<Vec<_>>()[..] {
        // One process numbers its batches over all topics, so several cannot be told apart.
        [publisher] => publisher.last(),
        _ => None,
    };
    let result = match last {
        None => Ok(false),
        Some(last) => {
            let mut is_same = false;
            let asked = ask(topics, replay, last, |topics, batch| {
                let known = topics.publishers.get(&batch.topic);
                is_same |= known.is_some_and(|known| known.is_last(batch.number, &batch.payload));
                false
            });
            asked.await.map(|()| is_same)
        }
    };
    let result = match result {
        Ok(true) => recover(topics, replay, last.map_or(0, |last| last + 1)).await,
        Ok(false) => {
            topics.forget();
            recover(topics, replay, 0).await
        }
        Err(error) => Err(error),
    };
    if let Err(error) = result {
        topics.forget();
        tracing::warn!(engine = topics.spec.name, %error, "an engine's replay socket does not answer");
    }
}

/// Takes the batches from a number on. A publisher that replays faster than its socket takes leaves some out;
/// they are asked for again as long as that brings more.
async fn recover(topics: &mut Topics, replay: &Address, mut from: u64) -> Result<(), LinkError> {
    loop {
        let (mut is_first, mut hole) = (true, None);
        ask(topics, replay, from, |topics, batch| {
            let first = std::mem::take(&mut is_first);
            let known = topics.publishers.get(&batch.topic).and_then(Publisher::last);
            hole = known.map(|last| last + 1).filter(|next| !first && batch.number > *next);
            hole.is_none()
        })
        .await?;
        match hole.filter(|hole| *hole > from) {
            None => return Ok(()),
            Some(hole) => from = hole,
        }
    }
}

/// Asks for the batches from a number on, and takes them as long as `goes_on` says so.
async fn ask(
    topics: &mut Topics,
    replay: &Address,
    from: u64,
    mut goes_on: impl FnMut(&Topics, &Batch) -> bool,
) -> Result<(), LinkError> {
    let asked = async {
        let (mut reader, mut writer) = open(replay, Kind::Dealer).await?;
        writer.send_message(&[Bytes::new(), Bytes::copy_from_slice(&from.to_be_bytes())]).await?;
        loop {
            let message = message(&mut reader, &mut writer).await?;
            // Older engines leave out the topic.
            let (topic, number, payload) = match &message[..] {
                [_, topic, number, payload] => (topic.clone(), number, payload),
                [_, number, payload] => {
                    (topics.publishers.keys().next().cloned().unwrap_or_default(), number, payload)
                }
                _ => return Err(LinkError::Peer("answers a replay with something else")),
            };
            let number = <[u8; 8]>::try_from(&number[..]).map(u64::from_be_bytes);
            let number = number.map_err(|_| LinkError::Peer("answers a replay with something else"))?;
            if number == REPLAY_END {
                return Ok(());
            }
            let batch = Batch { topic, number, payload: payload.clone() };
            if !batch.topic.starts_with(topics.spec.topic.as_bytes()) {
                continue;
            }
            if !goes_on(topics, &batch) {
                return Ok(());
            }
            topics.take_anyway(&batch);
        }
    };
    timeout(REPLAY_TIME_MAX, asked).await.map_err(|_| LinkError::Silent)?
}
