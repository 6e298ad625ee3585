"""The public interface as a contract: one document, two codecs, many clients."""
