//! What keeps the daemon from being whole, for probes and operators. It goes on serving: none of it is a reason to end it.

use terrace_media::DeviceFacts;

use crate::engine::Engine;

/// One line for each part that is out; none when all is well. Waits for the core, as every request does: a daemon whose
/// core hangs does not answer, and is to be ended.
pub(crate) fn troubles(engine: &Engine) -> Vec<String> {
    let gpus = engine.view(|core| core.tier_views().hbm);
    let facts = engine.media().facts();
    let mut troubles = Vec::new();
    if !facts.catalog_usable || engine.is_degraded() {
        troubles.push("the catalog takes no writes: blocks are served, none is persisted".to_owned());
    }
    let out = facts.devices.iter().filter(|device| !device.usable);
    let told = |device: &DeviceFacts| format!("device {}: {}", device.path.display(), device.condition);
    troubles.extend(out.map(told));
    for gpu in gpus.iter().filter(|gpu| !gpu.usable) {
        let (name, why) = (engine.hbm().name(gpu.gpu), engine.hbm().note(gpu.gpu));
        troubles.push(format!("{name} of the Hbm tier is off: {why}"));
    }
    // A reason is the system's or a driver's words.
    troubles.iter().map(|line| line.replace(['\n', '\r'], " ")).collect()
}

/// The body of `/healthz`: `ok`, or `degraded` and what is out.
pub(crate) fn page(engine: &Engine) -> String {
    let troubles = troubles(engine);
    let verdict = if troubles.is_empty() { "ok" } else { "degraded" };
    let lines = std::iter::once(verdict).chain(troubles.iter().map(String::as_str));
    lines.flat_map(|line| [line, "\n"]).collect()
}
