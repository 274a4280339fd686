//! Tasks beside the requests: ticks, memory, and the repair of the catalog.

use std::sync::Arc;
use std::time::Duration;

use terrace_core::{ByteCount, Input, MIB};
use terrace_media::CatalogError;

use crate::engine::Engine;

/// How often the machine's memory is looked at.
const MEMORY_PERIOD: Duration = Duration::from_secs(1);
/// The machine keeps this much for everything else.
const HEADROOM_BYTES: u64 = 256 * MIB;
/// First and longest pause between two tries to repair the catalog.
const REPAIR_PAUSE: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(10));
/// Pause before the next look at a disk that is full.
const NO_ROOM_PAUSE: Duration = Duration::from_millis(500);

/// Tells the core how much memory chunks may take, whenever that changes.
/// Chunks that a dead daemon's clients still map come back to the machine when
/// they end, so the pool grows by itself after a restart.
pub(crate) async fn watch_memory(engine: Arc<Engine>, pinned: ByteCount, chunk: ByteCount) {
    let mut told = pinned;
    loop {
        let lingering = engine.media().facts().lingering.get();
        let existing = engine.view(|core| core.tier_views().pinned.bytes.get());
        let free = terrace_media::memory_available().get().saturating_sub(HEADROOM_BYTES);
        let limit = pinned.get().saturating_sub(lingering).min(existing.saturating_add(free));
        let limit = ByteCount::new(limit - limit % chunk.get());
        if limit != told {
            tracing::info!(bytes = limit.get(), lingering, "memory for chunks");
            engine.submit(Input::MemoryLimit { bytes: limit });
            told = limit;
        }
        tokio::time::sleep(MEMORY_PERIOD).await;
    }
}

/// Reopens the catalog after a failure, with growing pauses, until it works.
pub(crate) async fn repair_catalog(engine: Arc<Engine>) {
    loop {
        engine.in_trouble().await;
        let mut pause = REPAIR_PAUSE.0;
        loop {
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(REPAIR_PAUSE.1);
            let trying = engine.clone();
            let repaired = tokio::task::spawn_blocking(move || repair(&trying)).await;
            match repaired {
                Ok(Ok(())) => break,
                Ok(Err(error @ CatalogError::NoRoom { .. })) => {
                    // To look for room costs nothing: durability comes back soon after it does.
                    pause = NO_ROOM_PAUSE;
                    tracing::debug!(%error, "the catalog is still not usable");
                }
                Ok(Err(error)) => tracing::warn!(%error, "the catalog is still not usable"),
                Err(error) => tracing::error!(%error, "repairing the catalog panicked"),
            }
        }
        tracing::info!("the catalog takes writes again");
        engine.catalog_repaired();
    }
}

fn repair(engine: &Engine) -> Result<(), CatalogError> {
    engine.media().reopen_catalog()?;
    // Spaces that were opened meanwhile are not in it yet.
    for (space, _) in engine.spaces().all() {
        if let Some(record) = engine.spaces().record(space) {
            engine.media().put_space(record)?;
        }
    }
    Ok(())
}
