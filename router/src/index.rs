//! What the daemons hold of a prompt.
//!
//! The router follows every daemon that it is given and keeps an index of their
//! blocks, so that a look-up is a walk in its own memory. A daemon is asked itself
//! only before its first snapshot is complete, and, outside of look-ups, for how
//! long its devices take, as only it knows their queues.
//!
//! The index may be late. What it says that is gone costs a miss, and what it does
//! not say yet is found by the worker. A look-up that fails or takes too long is no
//! error: the prompt is placed as if that daemon had nothing.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::future::join_all;
use terrace_client::{ClientError, Connector, Target, wire};
use terrace_core::{TokenCount, chain_keys};
use terrace_index::{HolderId, Index as Blocks, Key, Limits, Stretch};
use tokio::sync::watch;
use tokio::task::AbortHandle;

mod follow;
mod gauges;
mod mirror;
mod open;
mod shared;
mod view;

use crate::config::Config;
use crate::engines::{ENGINE_HOLDERS_MAX, Engines};
use crate::metrics::Metrics;
use crate::names::Names;
use crate::place::source::{Fetch, View};
use gauges::{Gauges, Row};
use mirror::{HOLDERS, Mirror, Shown};
use open::Open;
pub(crate) use shared::Named;
use shared::Spaces;
#[cfg(test)]
pub(crate) use shared::names;

/// A longer prompt is hashed on a thread of its own, so that others need not wait.
const HASHED_HERE_TOKENS_MAX: usize = 1 << 16;

/// The blocks of all daemons.
#[derive(Debug)]
pub struct Index {
    wait: Duration,
    blocks: Arc<Blocks>,
    daemons: Vec<Daemon>,
    engines: Engines,
    names: Arc<Names>,
    gauges: Gauges,
}

/// One daemon that is followed.
#[derive(Debug)]
struct Daemon {
    number: u32,
    name: String,
    tenant: String,
    spaces: Spaces,
    blocks: Arc<Blocks>,
    shown: Arc<Shown>,
    current: watch::Receiver<Option<Arc<Open>>>,
    follower: AbortHandle,
}

/// What the daemons hold of a prompt in one space.
#[derive(Clone, Debug, Default)]
pub struct Found {
    /// For each daemon, where the blocks are and how long loading them takes.
    pub views: Vec<View>,
    keys: Arc<Vec<[u8; 16]>>,
    block_tokens: u64,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.follower.abort();
    }
}

impl Index {
    /// Follows every daemon in the background. Call it inside a tokio runtime.
    ///
    /// # Errors
    /// When two metrics have one name, which a test rules out.
    pub fn start(config: &Config) -> Result<Self, prometheus::Error> {
        let count = u32::try_from(config.grpc.len()).unwrap_or(u32::MAX);
        let holders = count.saturating_mul(HOLDERS);
        let limits = Limits { holders: holders + ENGINE_HOLDERS_MAX, bytes: config.index_bytes_max };
        let blocks = Arc::new(Blocks::new(limits));
        let names = Arc::new(Names::new(config.names_max));
        let engines = Engines::start(config, Arc::clone(&blocks), holders, &names)?;
        let daemons = (0..count).zip(&config.grpc);
        let daemons = daemons.map(|(number, grpc)| Daemon::start(config, &blocks, number, grpc)).collect();
        Ok(Self { wait: config.index_wait, blocks, daemons, engines, names, gauges: Gauges::new()? })
    }

    /// What `space` holds of these tokens, one view for each daemon.
    pub async fn look_up(&self, space: &wire::SpaceManifest, tokens: &[u32], metrics: &Metrics) -> Found {
        let block_tokens = u64::from(space.tokens_per_block);
        if block_tokens == 0 || tokens.len() < space.tokens_per_block as usize {
            return Found { views: vec![View::default(); self.daemons.len()], ..Found::default() };
        }
        self.names.learn_prompt(tokens, space.tokens_per_block);
        let keys = Arc::new(hash(tokens, TokenCount::new(space.tokens_per_block)).await);
        let asked = join_all(self.daemons.iter().map(|daemon| {
            let looked = daemon.look_up(space, &keys);
            async move { tokio::time::timeout(self.wait, looked).await }
        }));
        let mut views = Vec::with_capacity(self.daemons.len());
        for (daemon, answer) in self.daemons.iter().zip(asked.await) {
            let view = match answer {
                Ok(Ok(view)) => Some(view),
                Ok(Err(error)) => {
                    tracing::debug!(daemon = daemon.name, %error, "a daemon's blocks cannot be looked up");
                    None
                }
                Err(_) => {
                    let wait = self.wait.as_millis();
                    tracing::debug!(daemon = daemon.name, "no answer in {wait} ms");
                    None
                }
            };
            if view.is_none() {
                metrics.index_failed();
            }
            views.push(view.unwrap_or_default());
        }
        Found { views, keys, block_tokens }
    }

    /// Asks for a part of what was found, so that it is on its way before a
    /// worker leases it. Nobody waits for the answer.
    pub fn prefetch(&self, space: &wire::SpaceManifest, found: &Found, part: &Fetch) {
        let daemon = self.daemons.iter().find(|daemon| daemon.number == part.holder);
        let Some(open) = daemon.and_then(|daemon| daemon.current.borrow().clone()) else { return };
        let block = |tokens: u64| usize::try_from(tokens / found.block_tokens.max(1)).unwrap_or(usize::MAX);
        let Some(keys) = found.keys.get(block(part.begin)..block(part.end).min(found.keys.len())) else {
            return;
        };
        let keys = keys[..keys.len().min(open.blocks_max())].to_vec();
        let space = space.clone();
        tokio::spawn(async move {
            let asked = async { open.prefetch(&open.space(&space).await?.space, &keys).await };
            if let Err(error) = asked.await {
                tracing::debug!(%error, "blocks could not be asked for in advance");
            }
        });
    }

    /// What engines tell of their own caches.
    pub fn engines(&self) -> &Engines {
        &self.engines
    }

    /// Blocks in the index.
    pub fn blocks(&self) -> u64 {
        self.blocks.counts().blocks
    }

    /// The warmest prefixes with the names of some of their holders; with `parents` what they go on from as well.
    /// Looks at the whole index.
    pub fn warmest(&self, count: usize, parents: bool) -> Vec<(Stretch, Vec<String>)> {
        let name = |holder: &HolderId| {
            let daemon = self.daemons.iter().find(|daemon| daemon.shown.holder() == Some(*holder));
            let engine = || self.engines.holder_name(*holder);
            // A snapshot that is being loaded is nobody's yet.
            daemon.map(|daemon| daemon.name.clone()).or_else(engine)
        };
        let found = self.blocks.warmest(count, parents);
        let named = |stretch: Stretch| {
            let names = stretch.holders.iter().filter_map(name).collect();
            (stretch, names)
        };
        found.into_iter().map(named).collect()
    }

    /// Daemons that are followed.
    pub fn daemons(&self) -> usize {
        self.daemons.len()
    }

    /// The Prometheus text of the index.
    ///
    /// # Errors
    /// When a metric cannot be written, which a test rules out.
    pub fn text(&self) -> Result<String, prometheus::Error> {
        let rows: Vec<Row<'_>> = self.daemons.iter().map(Daemon::row).collect();
        Ok(self.gauges.text(self.blocks.counts(), &rows)? + &self.engines.text()?)
    }
}

impl Daemon {
    fn start(config: &Config, blocks: &Arc<Blocks>, number: u32, grpc: &str) -> Self {
        let connector = Connector::new(Target {
            socket: config.socket.clone().filter(|_| number == 0),
            grpc: Some(grpc.to_owned()),
            tenant: config.tenant.clone(),
            token: config.token.clone(),
            client_name: format!("{} pid {}", config.name, std::process::id()),
            answer_within: None,
            copy_threads: None,
        });
        let shown = Arc::new(Shown::default());
        let mirror = Mirror::new(Arc::clone(blocks), number, Arc::clone(&shown));
        let (publish, current) = watch::channel(None);
        let follower = tokio::spawn(follow::follow(connector, mirror, publish)).abort_handle();
        Self {
            number,
            name: grpc.to_owned(),
            tenant: config.tenant.clone(),
            spaces: Spaces::default(),
            blocks: Arc::clone(blocks),
            shown,
            current,
            follower,
        }
    }

    fn row(&self) -> Row<'_> {
        Row {
            daemon: &self.name,
            connected: self.current.borrow().is_some(),
            known: self.shown.holder().is_some(),
            behind: self.shown.behind.load(Ordering::Relaxed),
            applied: self.shown.applied.load(Ordering::Relaxed),
            snapshots: self.shown.snapshots.load(Ordering::Relaxed),
        }
    }

    /// What it holds of a prompt.
    async fn look_up(&self, manifest: &wire::SpaceManifest, keys: &[[u8; 16]]) -> Result<View, ClientError> {
        // A daemon that is away serves nobody, whatever it holds.
        let open = self.current.borrow().clone().ok_or(ClientError::Disconnected)?;
        let space = open.space(manifest).await?;
        let block_tokens = u64::from(manifest.tokens_per_block);
        let Some(holder) = self.shown.holder() else {
            let keys = &keys[..keys.len().min(open.blocks_max())];
            let asked = open.ask(&space.space, keys).await.inspect_err(|_| open.forget(manifest))?;
            return Ok(view::of_match(&asked.blocks[..asked.prefix], self.number, block_tokens));
        };
        let ids: Vec<Key> =
            keys.iter().map(|key| Key::from_bytes(space.space.block_id(key).to_bytes())).collect();
        let mut found = terrace_index::Found::new();
        self.blocks.find(&ids, &mut found);
        let Some(held) = found.held(holder) else { return Ok(View::default()) };
        // What prompts begin with stays when memory runs out. One prompt's part in that is not worth waiting for.
        let prefix = &ids[..held.prefix[2] as usize];
        self.blocks.touch_unless_busy(holder, prefix).expect("the index was made for all daemons' holders");
        let on_devices = view::on_devices(&found, holder).next();
        let seconds = match on_devices {
            Some((start, end)) => open.nvme_seconds(&space, &keys[start as usize..end as usize]).await,
            None => 0.0,
        };
        Ok(view::of_index(&found, holder, self.number, block_tokens, seconds))
    }
}

async fn hash(tokens: &[u32], per_block: TokenCount) -> Vec<[u8; 16]> {
    if tokens.len() <= HASHED_HERE_TOKENS_MAX {
        return chain_keys(tokens, per_block);
    }
    let tokens = tokens.to_vec();
    let hashed = tokio::task::spawn_blocking(move || chain_keys(&tokens, per_block)).await;
    hashed.expect("hashing tokens does not panic")
}
