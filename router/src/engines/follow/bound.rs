//! Publishers that come to us: each connection has a reader, and one task applies
//! what they bring.
//!
//! A connection says nothing of who is behind it, so a publisher whose connection is
//! another than before begins anew.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{Semaphore, mpsc};
use tokio::time::Instant;

use super::Topics;
use crate::engines::publisher::{Publisher, Shown};
use crate::zmtp::address::{Address, Stream};
use crate::zmtp::link;
use crate::zmtp::{Kind, LinkError, Message};

/// Most connections to one port; more wait.
const CONNECTIONS_MAX: usize = 32;
/// Messages between the readers and the one who applies them.
const AHEAD: usize = 4;
const LISTEN_PAUSE: Duration = Duration::from_secs(1);

/// What a reader brings; none if its connection ended.
struct Brought {
    connection: u64,
    message: Option<Message>,
}

/// Which connection a topic's publisher has, and when it was lost.
struct Owner {
    connection: u64,
    lost: Option<Instant>,
}

pub(super) async fn listen(mut topics: Topics, address: &Address, lost_after: Duration) {
    let (bring, mut brought) = mpsc::channel(AHEAD);
    let accepting = accept(address.clone(), topics.spec.topic.clone(), topics.spec.name.clone(), bring);
    let mut owners: BTreeMap<Bytes, Owner> = BTreeMap::new();
    let mut live = 0u64;
    let mut tick =
        tokio::time::interval((lost_after / 4).clamp(Duration::from_millis(50), Duration::from_secs(1)));
    let applying = async {
        loop {
            tokio::select! {
                brought = brought.recv() => match brought {
                    None => return,
                    Some(Brought { connection, message: Some(message) }) => {
                        if message.is_empty() {
                            live += 1;
                        } else {
                            take(&mut topics, &mut owners, connection, &message);
                        }
                    }
                    Some(Brought { connection, message: None }) => {
                        live -= 1;
                        let lost = Some(Instant::now());
                        let own = owners.values_mut().filter(|owner| owner.connection == connection);
                        own.for_each(|owner| owner.lost = lost);
                    }
                },
                _ = tick.tick() => {
                    let is_lost = |owner: &Owner| owner.lost.is_some_and(|lost| lost.elapsed() > lost_after);
                    owners.retain(|topic, owner| {
                        let is_lost = is_lost(owner);
                        if is_lost {
                            topics.publishers.remove(topic);
                        }
                        !is_lost
                    });
                }
            }
            topics.shown.connected.store(live > 0, Ordering::Relaxed);
        }
    };
    tokio::select! {
        () = accepting => {}
        () = applying => {}
    }
}

fn take(topics: &mut Topics, owners: &mut BTreeMap<Bytes, Owner>, connection: u64, message: &Message) {
    let Some(batch) = topics.batch(message) else { return };
    let before = owners.get(&batch.topic).map(|owner| owner.connection);
    if before.is_some_and(|before| before > connection) {
        // Somebody with this topic came later: this one is an old life that has not noticed.
        return Shown::count(&topics.shown.repeated);
    }
    let is_new = before != Some(connection);
    let expected = topics.publishers.get(&batch.topic).and_then(Publisher::last).map(|last| last + 1);
    if !is_new && expected.is_some_and(|expected| batch.number > expected) {
        Shown::count(&topics.shown.gaps);
    }
    let Some(publisher) = topics.publisher(&batch.topic) else { return Shown::count(&topics.shown.bad) };
    if is_new {
        publisher.forget();
        owners.insert(Bytes::copy_from_slice(&batch.topic), Owner { connection, lost: None });
    }
    topics.take_anyway(&batch);
}

/// Takes connections for ever.
async fn accept(address: Address, topic: String, engine: String, bring: mpsc::Sender<Brought>) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut connection = 0;
    loop {
        let listener = match address.listen().await {
            Ok(listener) => listener,
            Err(error) => {
                tracing::warn!(engine, %address, %error, "an engine's events cannot be listened for");
                tokio::time::sleep(LISTEN_PAUSE).await;
                continue;
            }
        };
        tracing::info!(engine, %address, "an engine's events are listened for");
        loop {
            let place = Arc::clone(&places).acquire_owned().await.expect("nobody closes the semaphore");
            let stream = match listener.accept().await {
                Ok(stream) => stream,
                Err(error) => {
                    tracing::warn!(engine, %error, "a connection cannot be taken");
                    break tokio::time::sleep(LISTEN_PAUSE).await;
                }
            };
            connection += 1;
            let (bring, topic, engine) = (bring.clone(), topic.clone(), engine.clone());
            tokio::spawn(async move {
                let _place = place;
                let ended = tokio::select! {
                    ended = read(stream, &topic, connection, &bring) => ended,
                    () = bring.closed() => return,
                };
                tracing::info!(engine, error = %ended, "an engine's connection ended");
            });
        }
    }
}

async fn read(
    stream: Box<dyn Stream>,
    topic: &str,
    connection: u64,
    bring: &mpsc::Sender<Brought>,
) -> LinkError {
    let (mut reader, mut writer) = match link::open(stream, Kind::Sub).await {
        Ok(link) => link,
        Err(error) => return error,
    };
    if let Err(error) = writer.subscribe(topic.as_bytes()).await {
        return error;
    }
    // An empty message tells that the connection is there.
    let mut next = Ok(Message::new());
    loop {
        let (message, error) = match next {
            Ok(message) => (Some(message), None),
            Err(error) => (None, Some(error)),
        };
        // Whoever applies is gone with the whole engine.
        let _ = bring.send(Brought { connection, message }).await;
        if let Some(error) = error {
            return error;
        }
        next = super::message(&mut reader, &mut writer).await;
    }
}
