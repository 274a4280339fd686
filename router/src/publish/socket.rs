//! The PUB and the ROUTER socket of a publisher.
//!
//! Each subscriber has a queue of a fixed length; one that does not read fast enough
//! is cut off, and asks for what it missed when it is back. The last batches are kept
//! for that, as many as fit.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::sync::{Semaphore, mpsc};

use crate::zmtp::address::{Listener, Stream};
use crate::zmtp::link::{self, Sent};
use crate::zmtp::{Kind, LinkError, frame};

/// Batches between us and a subscriber.
const QUEUE: usize = 256;
/// Batches that can be replayed, as vLLM's default is.
const MEMORY_BATCHES: usize = 10_000;
const MEMORY_BYTES: usize = 64 << 20;
/// Most connections of each socket.
const CONNECTIONS_MAX: usize = 64;
/// Most topics that a subscriber asks for.
const TOPICS_MAX: usize = 64;
/// What ends a replay.
const END: [u8; 8] = [0xff; 8];
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What subscribers are sent, and what they were.
#[derive(Debug)]
pub(super) struct Hub {
    topic: Bytes,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    next: u64,
    memory: VecDeque<(u64, Bytes)>,
    bytes: usize,
    subscribers: Vec<mpsc::Sender<Bytes>>,
    cut_off: u64,
}

impl Hub {
    pub(super) fn new(topic: &str) -> Self {
        Self { topic: Bytes::copy_from_slice(topic.as_bytes()), state: Mutex::default() }
    }

    /// Sends a batch to everybody who wants it, and keeps it.
    pub(super) fn publish(&self, payload: Vec<u8>) {
        let payload = Bytes::from(payload);
        let mut state = self.lock();
        let number = state.next;
        state.next += 1;
        let mut message = BytesMut::new();
        let number_bytes = Bytes::copy_from_slice(&number.to_be_bytes());
        frame::put_message(&mut message, &[self.topic.clone(), number_bytes, payload.clone()]);
        let message = message.freeze();
        let before = state.subscribers.len();
        let mut cut_off = 0;
        state.subscribers.retain(|subscriber| match subscriber.try_send(message.clone()) {
            Ok(()) => true,
            Err(mpsc::error::TrySendError::Closed(_)) => false,
            Err(mpsc::error::TrySendError::Full(_)) => {
                cut_off += 1;
                false
            }
        });
        debug_assert!(state.subscribers.len() <= before, "nobody comes while others leave");
        state.cut_off += cut_off;
        state.bytes += payload.len();
        state.memory.push_back((number, payload));
        while state.memory.len() > MEMORY_BATCHES || state.bytes > MEMORY_BYTES {
            let Some((_, oldest)) = state.memory.pop_front() else { break };
            state.bytes -= oldest.len();
        }
    }

    /// Batches published, and subscribers cut off.
    pub(super) fn counts(&self) -> (u64, u64) {
        let state = self.lock();
        (state.next, state.cut_off)
    }

    fn subscribe(&self) -> mpsc::Receiver<Bytes> {
        let (subscriber, queue) = mpsc::channel(QUEUE);
        self.lock().subscribers.push(subscriber);
        queue
    }

    /// The first batch that is kept from a number on.
    fn kept(&self, from: u64) -> Option<(u64, Bytes)> {
        let state = self.lock();
        let place = state.memory.partition_point(|(number, _)| *number < from);
        state.memory.get(place).cloned()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic in the middle leaves a number without its batch, which subscribers see as a gap.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes subscribers for ever.
pub(super) async fn publish(listener: Listener, hub: Arc<Hub>) {
    accept(listener, hub, |stream, hub| Box::pin(serve(stream, hub))).await;
}

/// Takes those who ask for a replay for ever.
pub(super) async fn replay(listener: Listener, hub: Arc<Hub>) {
    accept(listener, hub, |stream, hub| Box::pin(answer(stream, hub))).await;
}

type Serving = std::pin::Pin<Box<dyn Future<Output = LinkError> + Send>>;

async fn accept(listener: Listener, hub: Arc<Hub>, serve: fn(Box<dyn Stream>, Arc<Hub>) -> Serving) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let place = Arc::clone(&places).acquire_owned().await.expect("nobody closes the semaphore");
        match listener.accept().await {
            Ok(stream) => {
                let serving = serve(stream, Arc::clone(&hub));
                tokio::spawn(async move {
                    let _place = place;
                    let error = serving.await;
                    tracing::debug!(%error, "a subscriber's connection ended");
                });
            }
            Err(error) => {
                tracing::warn!(%error, "a subscriber's connection cannot be taken");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// One subscriber.
async fn serve(stream: Box<dyn Stream>, hub: Arc<Hub>) -> LinkError {
    let (mut reader, mut writer) = match link::open(stream, Kind::Pub).await {
        Ok(link) => link,
        Err(error) => return error,
    };
    let mut queue = hub.subscribe();
    let topics = Mutex::new(Vec::<Bytes>::new());
    let wants = |topics: &Vec<Bytes>| topics.iter().any(|topic| hub.topic.starts_with(topic));
    let (pongs, mut pong) = mpsc::channel::<BytesMut>(1);
    let reading = async {
        loop {
            let sent = reader.next().await?;
            let mut topics = topics.lock().unwrap_or_else(PoisonError::into_inner);
            match sent {
                Sent::Ping { pong } => {
                    // One that is not taken in time is left out: the peer asks again.
                    let _ = pongs.try_send(pong);
                }
                Sent::Subscribe(topic) if topics.len() < TOPICS_MAX => topics.push(topic),
                Sent::Subscribe(_) => return Err(LinkError::Peer("subscribes to too many topics")),
                Sent::Cancel(topic) => {
                    if let Some(place) = topics.iter().position(|known| *known == topic) {
                        topics.swap_remove(place);
                    }
                }
                Sent::Message(_) => {}
            }
        }
    };
    let writing = async {
        loop {
            let bytes = tokio::select! {
                message = queue.recv() => message.ok_or(LinkError::Peer("did not read fast enough"))?,
                Some(pong) = pong.recv() => {
                    writer.send(&pong).await?;
                    continue;
                }
            };
            let is_wanted = wants(&topics.lock().unwrap_or_else(PoisonError::into_inner));
            if is_wanted {
                writer.send(&bytes).await?;
            }
        }
    };
    let ended: Result<(), LinkError> = tokio::select! {
        ended = reading => ended,
        ended = writing => ended,
    };
    ended.expect_err("neither half ends without a reason")
}

/// One who asks for what it missed.
async fn answer(stream: Box<dyn Stream>, hub: Arc<Hub>) -> LinkError {
    let answered = async {
        let (mut reader, mut writer) = link::open(stream, Kind::Router).await?;
        loop {
            let message = match reader.next().await? {
                Sent::Message(message) => message,
                Sent::Ping { pong } => {
                    writer.send(&pong).await?;
                    continue;
                }
                Sent::Subscribe(_) | Sent::Cancel(_) => continue,
            };
            let number = match &message[..] {
                [delimiter, number] if delimiter.is_empty() => <[u8; 8]>::try_from(&number[..]).ok(),
                _ => None,
            };
            let Some(number) = number else { return Err(LinkError::Peer("asks for no number")) };
            let mut next = u64::from_be_bytes(number);
            while let Some((number, payload)) = hub.kept(next) {
                let number_bytes = Bytes::copy_from_slice(&number.to_be_bytes());
                writer.send_message(&[Bytes::new(), hub.topic.clone(), number_bytes, payload]).await?;
                next = number + 1;
            }
            writer
                .send_message(&[Bytes::new(), Bytes::new(), Bytes::from_static(&END), Bytes::new()])
                .await?;
        }
    };
    let ended: Result<(), LinkError> = answered.await;
    ended.expect_err("it ends with its connection")
}
