//! The sockets of one engine: events, and the replay of what was missed.
//!
//! A publisher that listens is connected to, over and over. One that comes to us may
//! share our port with others, so its topic tells it from them, and of two with the
//! same topic the newer one counts.
//!
//! After each connection the replay socket must give the last batch again; if it
//! cannot, the publisher may be another process by now, and begins anew. A replay that
//! fails is tried again, whether or not the publisher has anything new to tell. One that
//! is away for long holds nothing.

use std::collections::BTreeMap;
use std::pin::pin;
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
mod replay;

use replay::{Replay, due};

const CONNECT_TIME_MAX: Duration = Duration::from_secs(5);
const PAUSE_MIN: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(5);
/// A connection that held so long was a good one: the next pause is short again.
const HELD: Duration = Duration::from_secs(10);
/// Most topics of one engine.
const TOPICS_MAX: usize = 64;
const TOPIC_BYTES_MAX: usize = 256;

/// Follows one engine. Never ends; may be dropped at any time.
pub(super) async fn follow(spec: Arc<Spec>, holders: Arc<Holders>, shown: Arc<Shown>, lost_after: Duration) {
    let publishers = BTreeMap::new();
    let topics = Topics { spec: Arc::clone(&spec), holders, shown, publishers, lacks_start: false };
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
    /// What is known may begin later than what could be replayed: no replay was had before its first batch.
    lacks_start: bool,
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

    /// The last batch of a topic's publisher.
    fn last(&self, topic: &Bytes) -> Option<u64> {
        self.publishers.get(topic).and_then(Publisher::last)
    }

    /// Whether any publisher's batches are believed.
    fn knows(&self) -> bool {
        self.publishers.values().any(|publisher| publisher.last().is_some())
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
    if replay.is_none() || topics.lacks_start {
        topics.forget();
    }
    let mut replay = replay.map(Replay::new);
    if let Some(replay) = &mut replay {
        replay.catch_up(topics).await;
    }
    loop {
        let mut next = pin!(message(&mut reader, &mut writer));
        let message = loop {
            tokio::select! {
                next = &mut next => break next,
                replay = due(&mut replay) => replay.catch_up(topics).await,
            }
        };
        let message = match message {
            Ok(message) => message,
            Err(error) => return error,
        };
        let Some(batch) = topics.batch(&message) else { continue };
        let taken =
            topics.publisher(&batch.topic).map(|publisher| publisher.take(batch.number, &batch.payload));
        let Some(Taken::Gap { from }) = taken else { continue };
        Shown::count(&topics.shown.gaps);
        match &mut replay {
            Some(replay) => replay.fill(topics, &batch, from).await,
            None => topics.take_anyway(&batch),
        }
    }
}

async fn open(address: &Address, kind: Kind) -> Result<(Reader, Writer), LinkError> {
    let stream = timeout(CONNECT_TIME_MAX, address.connect()).await.map_err(|_| LinkError::Silent)??;
    link::open(stream, kind).await
}

/// The next message; pings are answered.
async fn message(reader: &mut Reader, writer: &mut Writer) -> Result<Message, LinkError> {
    loop {
        match reader.next().await? {
            Sent::Message(message) => return Ok(message),
            Sent::Ping { pong } => writer.send(&pong).await?,
            Sent::Subscribe(_) | Sent::Cancel(_) => {}
        }
    }
}
