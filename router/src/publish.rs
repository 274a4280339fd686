//! Tells other routers what the daemons hold, in vLLM's words: a PUB socket, a
//! ROUTER socket for what a subscriber missed, and everything at once for those who
//! begin.
//!
//! Daemons know blocks by ids that mean nothing elsewhere, so only blocks with
//! [`crate::names`] are told of. All daemons together are one publisher: a block is
//! stored when the first has it and removed when the last lost it. What is published
//! is the difference between what was told and what the index says, looked at again
//! when the index or the names have changed: late by a moment, never wrong for long,
//! and the same after whatever went wrong.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use prometheus::{Encoder, IntCounter, Registry, TextEncoder};
use serde_json::Value;
use terrace_index::events::{Move, encode};
use tokio::task::AbortHandle;

mod ledger;
pub mod owner;
mod socket;

use crate::config::Config;
use crate::index::Index;
use crate::serve::Router;
use crate::zmtp::address::Address;
use ledger::Ledger;
use owner::CacheOwner;
use socket::Hub;

/// Time between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// A look may take one part in so many of the time.
const IDLE_PARTS: u32 = 10;

/// How the daemons' blocks are published.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Publishing {
    /// Of the PUB socket.
    pub events: Address,
    /// Of the ROUTER socket.
    pub replay: Option<Address>,
    /// In front of each batch.
    pub topic: String,
    /// How tiers are called.
    pub media: Media,
    /// What Dynamo calls the pool.
    pub owner: Option<CacheOwner>,
    /// The worker that Dynamo is to credit.
    pub worker: u64,
}

/// How tiers are called.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Media {
    /// By what they are: `CPU_PINNED` and `DISK`.
    Tier,
    /// All alike: `EXTERNAL`, a pool that several nodes share.
    External,
}

/// A running publisher.
#[derive(Debug)]
pub struct Publisher {
    ledger: Arc<Mutex<Ledger>>,
    settings: Publishing,
    hub: Arc<Hub>,
    tasks: Vec<AbortHandle>,
}

impl Drop for Publisher {
    fn drop(&mut self) {
        self.tasks.iter().for_each(AbortHandle::abort);
    }
}

impl Publisher {
    /// Listens and publishes in the background. Call it inside a tokio runtime.
    ///
    /// # Errors
    /// When an address cannot be listened on.
    pub async fn start(router: &Arc<Router>) -> std::io::Result<Option<Self>> {
        let Some(settings) = router.config.publishing.clone() else { return Ok(None) };
        let hub = Arc::new(Hub::new(&settings.topic));
        let ledger = Arc::new(Mutex::new(Ledger::new(settings.media)));
        let mut tasks = Vec::new();
        let listener = settings.events.listen().await?;
        tasks.push(tokio::spawn(socket::publish(listener, Arc::clone(&hub))).abort_handle());
        if let Some(replay) = &settings.replay {
            let listener = replay.listen().await?;
            tasks.push(tokio::spawn(socket::replay(listener, Arc::clone(&hub))).abort_handle());
        }
        let looking = look(Arc::downgrade(router), Arc::clone(&hub), Arc::clone(&ledger));
        tasks.push(tokio::spawn(looking).abort_handle());
        Ok(Some(Self { ledger, settings, hub, tasks }))
    }

    /// All that was told, as Dynamo's indexers give it to each other.
    pub fn dump(&self, config: &Config) -> Value {
        let model = config.model_name.as_deref().unwrap_or("default");
        lock(&self.ledger).dump(model, self.settings.worker, self.settings.owner.as_ref())
    }

    /// The Prometheus text of the publisher.
    ///
    /// # Errors
    /// When a metric cannot be written, which a test rules out.
    pub fn text(&self) -> Result<String, prometheus::Error> {
        let (batches, cut_off) = self.hub.counts();
        let registry = Registry::new();
        for (name, help, count) in [
            ("terrace_router_published_batches_total", "Batches of events that were published.", batches),
            (
                "terrace_router_published_cut_off_total",
                "Subscribers that were cut off, as they did not read fast enough.",
                cut_off,
            ),
        ] {
            let counter = IntCounter::new(name, help)?;
            counter.inc_by(count);
            registry.register(Box::new(counter))?;
        }
        let mut bytes = Vec::new();
        TextEncoder::new().encode(&registry.gather(), &mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }
}

fn lock(ledger: &Mutex<Ledger>) -> MutexGuard<'_, Ledger> {
    // A panic in the middle leaves changes untold; the next look finds them again.
    ledger.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Looks for differences. Ends with the router.
async fn look(router: std::sync::Weak<Router>, hub: Arc<Hub>, ledger: Arc<Mutex<Ledger>>) {
    // Whoever heard an earlier life of ours forgets it.
    hub.publish(encode(seconds(), &[Move::Cleared], None));
    let (mut seen, mut pause) = (None, LOOK_EVERY);
    loop {
        tokio::time::sleep(pause).await;
        let Some(router) = router.upgrade() else { return };
        let version = router.index.version();
        if seen == Some(version) {
            continue;
        }
        let began = Instant::now();
        let told = compare(&router.index, &ledger).await;
        for batch in told {
            hub.publish(batch);
            tokio::task::yield_now().await;
        }
        (seen, pause) = (Some(version), LOOK_EVERY.max(began.elapsed() * IDLE_PARTS));
    }
}

/// Batches that say what has changed.
async fn compare(index: &Index, ledger: &Mutex<Ledger>) -> Vec<Vec<u8>> {
    let held = index.held_names().await;
    lock(ledger).changes(held, seconds())
}

fn seconds() -> f64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}
