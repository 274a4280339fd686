//! What the store holds of a prompt.
//!
//! Asks the daemon's index over one session that is kept open in the background.
//! A look-up that fails or takes too long is no error: the prompt is placed as
//! if nothing were cached, and the worker finds the blocks by itself.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use terrace_client::{
    BlockMatch, ClientError, Connector, MatchMode, Session, Space, Target, from_wire, wire,
};
use terrace_core::{TokenCount, chain_keys};
use tokio::sync::watch;
use tokio::task::AbortHandle;

use crate::config::Config;
use crate::metrics::Metrics;
use crate::place::source::{Fetch, Link, Run, Tier, View};

/// Most spaces that are kept open.
const SPACES_MAX: usize = 64;
/// Pause after a refusal that waiting alone does not mend.
const PAUSE: Duration = Duration::from_secs(5);

/// Asks the daemon.
#[derive(Debug)]
pub struct Index {
    wait: Duration,
    current: watch::Receiver<Option<Arc<Open>>>,
    keeper: AbortHandle,
}

/// What one space holds of a prompt.
#[derive(Clone, Debug, Default)]
pub struct Found {
    /// Where the blocks are, and how long loading them takes.
    pub view: View,
    keys: Vec<[u8; 16]>,
    block_tokens: u64,
}

/// A session and the spaces that it has opened.
#[derive(Debug)]
struct Open {
    session: Session,
    spaces: Mutex<Vec<(wire::SpaceManifest, Space)>>,
}

impl Drop for Index {
    fn drop(&mut self) {
        self.keeper.abort();
    }
}

impl Index {
    /// Connects in the background. Call it inside a tokio runtime.
    pub fn start(config: &Config) -> Self {
        let connector = Connector::new(Target {
            socket: config.socket.clone(),
            grpc: Some(config.grpc.clone()),
            tenant: config.tenant.clone(),
            token: config.token.clone(),
            client_name: format!("{} pid {}", config.name, std::process::id()),
            answer_within: None,
        });
        let (publish, current) = watch::channel(None);
        let keeper = tokio::spawn(keep_open(connector, publish)).abort_handle();
        Self { wait: config.index_wait, current, keeper }
    }

    /// What `space` holds of these tokens.
    pub async fn look_up(&self, space: &wire::SpaceManifest, tokens: &[u32], metrics: &Metrics) -> Found {
        let current = self.current.borrow().clone();
        let Some(open) = current else {
            metrics.index_failed();
            return Found::default();
        };
        match tokio::time::timeout(self.wait, open.ask(space, tokens)).await {
            Ok(Ok(found)) => return found,
            Ok(Err(error)) => {
                tracing::debug!(%error, "the index cannot be asked");
                // The handle may be stale: the next look-up opens the space again.
                open.spaces().retain(|(known, _)| known != space);
            }
            Err(_) => tracing::debug!("the index did not answer in {} ms", self.wait.as_millis()),
        }
        metrics.index_failed();
        Found::default()
    }

    /// Asks for a part of what was found, so that it is on its way before a
    /// worker leases it. Nobody waits for the answer.
    pub fn prefetch(&self, space: &wire::SpaceManifest, found: &Found, part: &Fetch) {
        let Some(open) = self.current.borrow().clone() else { return };
        let block = |tokens: u64| usize::try_from(tokens / found.block_tokens.max(1)).unwrap_or(usize::MAX);
        let Some(keys) = found.keys.get(block(part.begin)..block(part.end).min(found.keys.len())) else {
            return;
        };
        let (keys, space) = (keys.to_vec(), space.clone());
        tokio::spawn(async move {
            let asked = async { open.session.prefetch(&open.space(&space).await?, &keys).await };
            if let Err(error) = asked.await {
                tracing::debug!(%error, "blocks could not be asked for in advance");
            }
        });
    }
}

impl Open {
    async fn ask(&self, manifest: &wire::SpaceManifest, tokens: &[u32]) -> Result<Found, ClientError> {
        if manifest.tokens_per_block == 0 {
            return Ok(Found::default());
        }
        let mut keys = chain_keys(tokens, TokenCount::new(manifest.tokens_per_block));
        keys.truncate(self.session.blocks_max());
        if keys.is_empty() {
            return Ok(Found::default());
        }
        let space = self.space(manifest).await?;
        let found = self.session.match_blocks(&[&space], &keys, MatchMode::Prefix).await?;
        keys.truncate(found.prefix);
        let block_tokens = u64::from(manifest.tokens_per_block);
        Ok(Found { view: view(&found.blocks[..found.prefix], block_tokens), keys, block_tokens })
    }

    async fn space(&self, manifest: &wire::SpaceManifest) -> Result<Space, ClientError> {
        if let Some((_, space)) = self.spaces().iter().find(|(known, _)| known == manifest) {
            return Ok(space.clone());
        }
        let checked = from_wire(manifest).map_err(|error| {
            tracing::warn!(model = manifest.model, %error, "a worker reported a space that is none");
            ClientError::Protocol { detail: "a worker's space manifest" }
        })?;
        let space = self.session.open_space(&checked).await?;
        let mut spaces = self.spaces();
        if spaces.len() == SPACES_MAX {
            spaces.remove(0);
        }
        spaces.push((manifest.clone(), space.clone()));
        Ok(space)
    }

    fn spaces(&self) -> MutexGuard<'_, Vec<(wire::SpaceManifest, Space)>> {
        // The list is never left half changed.
        self.spaces.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Runs of blocks in one tier of one holder. The daemon's estimates already hold
/// the queue in front of each device.
fn view(blocks: &[BlockMatch], block_tokens: u64) -> View {
    let mut view = View::default();
    let mut holders: Vec<&str> = Vec::new();
    let (mut begin, mut blocks) = (0, blocks);
    while let Some(first) = blocks.first() {
        let same = |block: &&BlockMatch| (block.tier, &block.holder) == (first.tier, &first.holder);
        let count = blocks.iter().take_while(same).count();
        let (run, rest) = blocks.split_at(count);
        let holder = holders.iter().position(|known| *known == first.holder).unwrap_or_else(|| {
            holders.push(&first.holder);
            holders.len() - 1
        });
        let end = begin + count as u64 * block_tokens;
        let fetch: Duration = run.iter().map(|block| block.fetch).sum();
        #[expect(clippy::cast_precision_loss, reason = "prompts are far shorter than 2^53 tokens")]
        let tokens = (end - begin) as f64;
        view.runs.push(Run { link: view.links.len(), begin, end });
        view.links.push(Link {
            holder: u32::try_from(holder).unwrap_or(u32::MAX),
            tier: match first.tier {
                wire::Tier::Hbm => Tier::Hbm,
                wire::Tier::Pinned => Tier::Pinned,
                wire::Tier::Nvme => Tier::Nvme,
                wire::Tier::Remote | wire::Tier::Unspecified => Tier::Remote,
            },
            latency_seconds: 0.0,
            seconds_per_token: fetch.as_secs_f64() / tokens,
            queued_seconds: 0.0,
        });
        (begin, blocks) = (end, rest);
    }
    view
}

/// Publishes a live session whenever there is one.
async fn keep_open(connector: Connector, publish: watch::Sender<Option<Arc<Open>>>) {
    loop {
        match connector.wait().await {
            Ok(session) => {
                let open = Open { session: session.clone(), spaces: Mutex::default() };
                publish.send_replace(Some(Arc::new(open)));
                session.closed().await;
                publish.send_replace(None);
                tracing::info!(
                    "the session with the daemon ended; prompts are placed without the index until it is back"
                );
            }
            Err(error) => {
                tracing::warn!(%error, "the daemon refuses a session; prompts are placed without the index");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs that are merged over a change of tier, or times that are lost, would place prompts by a wrong
    /// estimate: the view of a mixed match is compared with its blocks.
    #[test]
    fn a_match_becomes_runs_of_one_tier() {
        let block = |tier, holder: &str, fetch| BlockMatch {
            present: true,
            tier,
            holder: holder.to_owned(),
            fetch: Duration::from_millis(fetch),
        };
        let blocks = [
            block(wire::Tier::Pinned, "", 0),
            block(wire::Tier::Pinned, "", 0),
            block(wire::Tier::Nvme, "", 3),
            block(wire::Tier::Nvme, "", 5),
            block(wire::Tier::Remote, "other", 16),
        ];
        let view = view(&blocks, 16);
        let runs: Vec<_> = view.runs.iter().map(|run| (run.begin, run.end)).collect();
        assert_eq!(runs, [(0, 32), (32, 64), (64, 80)]);
        let holders: Vec<_> = view.links.iter().map(|link| (link.holder, link.tier)).collect();
        assert_eq!(holders, [(0, Tier::Pinned), (0, Tier::Nvme), (1, Tier::Remote)]);
        let fetches = view.fetches(80);
        assert!((fetches[1].seconds - 0.008).abs() < 1e-9 && (fetches[2].seconds - 0.016).abs() < 1e-9);
        assert!(view.split(81, crate::place::rate::Prefill::of_rate(100.0)).loaded_tokens == 80);
    }
}
