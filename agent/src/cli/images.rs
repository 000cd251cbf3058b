//! The catalogue of images: the tables `[images.NAME]` of the configuration, or on a login host without one the list
//! of names that the plugin checks `--vm` against.
use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde::Serialize;
use thiserror::Error;

/// The list of names, beside the configuration.
const LIST: &str = "images.list";

/// Why the catalogue cannot be shown.
#[derive(Debug, Error)]
pub enum ImagesError {
    /// Neither file can be read.
    #[error(
        "cannot read the images from {path}: {source}, nor from {LIST} beside it; run svm images on a compute node, \
         or ask your administrator for the list"
    )]
    Read {
        /// The configuration.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// It is no TOML.
    #[error("{path}: {why}")]
    Parse {
        /// The configuration.
        path: PathBuf,
        /// What is wrong with it, on one line.
        why: String,
    },
}

/// One image.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Image {
    /// What `--vm=` takes.
    pub name: String,
    /// Its settings, empty where only names are known.
    pub settings: toml::Table,
}

impl Image {
    /// A setting that is a text.
    pub fn text(&self, key: &str) -> &str {
        self.settings.get(key).and_then(toml::Value::as_str).unwrap_or_default()
    }
}

/// Reads the catalogue, sorted by name.
///
/// # Errors
/// When neither the configuration nor the list can be read.
pub fn read(config: &Path) -> Result<Vec<Image>, ImagesError> {
    let text = match fs::read_to_string(config) {
        Ok(text) => text,
        Err(source) => {
            let list = fs::read_to_string(config.with_file_name(LIST)).map_err(|_| ImagesError::Read {
                path: config.to_owned(),
                source,
            })?;
            return Ok(from_list(&list));
        }
    };
    let bad = |why: String| ImagesError::Parse {
        path: config.to_owned(),
        why,
    };
    let document: toml::Table = text.parse().map_err(|e: toml::de::Error| bad(e.message().to_owned()))?;
    let mut images = Vec::new();
    for (name, value) in document.get("images").and_then(toml::Value::as_table).into_iter().flatten() {
        let settings = value.as_table().ok_or_else(|| bad(format!("images.{name} is not a table")))?;
        images.push(Image {
            name: name.clone(),
            settings: settings.clone(),
        });
    }
    images.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(images)
}

fn from_list(list: &str) -> Vec<Image> {
    let names = list.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with('#'));
    let mut images: Vec<Image> = names
        .map(|n| Image {
            name: n.to_owned(),
            settings: toml::Table::new(),
        })
        .collect();
    images.sort_by(|a, b| a.name.cmp(&b.name));
    images
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_catalogue_comes_from_the_configuration_else_from_the_list() {
        let dir = tempfile::tempdir().unwrap();
        let config = dir.path().join("slurm-vm.toml");
        let names = || read(&config).unwrap().into_iter().map(|i| i.name).collect::<Vec<_>>();
        let error = read(&config).unwrap_err().to_string();
        assert!(error.contains("run svm images on a compute node"), "{error}");
        fs::write(dir.path().join(LIST), "# for --vm\nb\n\na\n").unwrap();
        assert_eq!(names(), ["a", "b"]);
        fs::write(&config, "cluster = \"c\"\n[images.tiny]\ndisk = \"/d\"\n[images.alma]\n").unwrap();
        assert_eq!(names(), ["alma", "tiny"]);
        assert_eq!(read(&config).unwrap()[1].text("disk"), "/d");
        fs::write(&config, "cluster = \n").unwrap();
        assert!(read(&config).unwrap_err().to_string().starts_with(&config.display().to_string()));
    }
}
