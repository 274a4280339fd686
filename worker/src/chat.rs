//! Chat templates: messages to one prompt, by the Jinja text in the GGUF file.
//!
//! Templates are written for Python, so the few methods of Python's strings and
//! dictionaries that they use are provided.

use minijinja::value::{Value, ValueKind, from_args};
use minijinja::{Environment, Error, ErrorKind, State, context};
use serde::{Deserialize, Serialize};
use thiserror::Error;

const TEMPLATE: &str = "chat";

/// One message of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// Its text.
    pub content: String,
}

/// Why there is no prompt.
#[derive(Debug, Error)]
pub enum ChatError {
    /// The file's template is not valid.
    #[error("the model's chat template does not parse: {0:#}")]
    Template(Error),
    /// The template refused the messages.
    #[error("the model's chat template refuses these messages: {0:#}")]
    Render(Error),
}

/// A model's template, ready to render.
pub struct ChatTemplate {
    environment: Environment<'static>,
    begin: String,
    end: String,
}

impl ChatTemplate {
    /// Parses a template; `begin` and `end` are the texts of the model's tokens.
    ///
    /// # Errors
    /// If it is not valid.
    pub fn new(source: &str, begin: &str, end: &str) -> Result<Self, ChatError> {
        let mut environment = Environment::new();
        // As Hugging Face renders templates.
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_unknown_method_callback(python_method);
        environment.add_function("raise_exception", |text: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, text))
        });
        environment.add_template_owned(TEMPLATE, source.to_owned()).map_err(ChatError::Template)?;
        Ok(Self { environment, begin: begin.to_owned(), end: end.to_owned() })
    }

    /// The prompt that asks for the next answer.
    ///
    /// # Errors
    /// If the template refuses the messages, for instance their order.
    pub fn render(&self, messages: &[Message]) -> Result<String, ChatError> {
        let template = self.environment.get_template(TEMPLATE).map_err(ChatError::Template)?;
        let rendered = template.render(context! {
            messages => messages,
            add_generation_prompt => true,
            bos_token => self.begin,
            eos_token => self.end,
        });
        rendered.map_err(ChatError::Render)
    }
}

fn python_method(state: &State<'_, '_>, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    let unknown = || Error::new(ErrorKind::UnknownMethod, format!("no method {method}"));
    if value.kind() == ValueKind::Map {
        return match method {
            "get" => {
                let (key, default): (Value, Option<Value>) = from_args(args)?;
                let found = value.get_item(&key)?;
                Ok(if found.is_undefined() { default.unwrap_or(Value::from(())) } else { found })
            }
            "items" => state.apply_filter("items", std::slice::from_ref(value)),
            _ => Err(unknown()),
        };
    }
    let text = value.as_str().ok_or_else(unknown)?;
    if matches!(method, "startswith" | "endswith" | "split") {
        let (argument,): (Option<&str>,) = from_args(args)?;
        return Ok(match (method, argument) {
            ("startswith", Some(start)) => Value::from(text.starts_with(start)),
            ("endswith", Some(end)) => Value::from(text.ends_with(end)),
            ("split", Some(separator)) if !separator.is_empty() => {
                text.split(separator).map(Value::from).collect()
            }
            ("split", _) => text.split_whitespace().map(Value::from).collect(),
            _ => return Err(unknown()),
        });
    }
    let changed = match method {
        "strip" => text.trim().to_owned(),
        "lstrip" => text.trim_start().to_owned(),
        "rstrip" => text.trim_end().to_owned(),
        "upper" => text.to_uppercase(),
        "lower" => text.to_lowercase(),
        _ => return Err(unknown()),
    };
    Ok(Value::from(changed))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(role: &str, content: &str) -> Message {
        Message { role: role.to_owned(), content: content.to_owned() }
    }

    // Templates call Python methods; a missing one would refuse every chat.
    #[test]
    fn python_methods_work() {
        let source = "{% for m in messages %}{{ m.get('role').upper() }}:{{ m['content'].strip() }}\
                      {% if m.content.startswith(' ') %}!{% endif %}{{ m.content.split()[0] }}{% endfor %}{{ eos_token }}";
        let template = ChatTemplate::new(source, "<b>", "<e>").unwrap();
        assert_eq!(template.render(&[message("user", " hi there ")]).unwrap(), "USER:hi there!hi<e>");
    }

    // A template that refuses messages must give its own words to the caller,
    // and a broken one must be an error, not a panic.
    #[test]
    fn refusals_are_errors() {
        let template = ChatTemplate::new("{{ raise_exception('roles must alternate') }}", "", "").unwrap();
        let error = template.render(&[message("user", "x")]).unwrap_err();
        assert!(error.to_string().contains("roles must alternate"), "{error}");
        assert!(matches!(ChatTemplate::new("{% if %}", "", ""), Err(ChatError::Template(_))));
    }
}
